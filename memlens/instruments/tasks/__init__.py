"""What an intervention costs elsewhere: benchmark tasks and lm-evaluation-harness."""
