"""What breaks when a component is replaced: heads, MLPs, neurons."""
