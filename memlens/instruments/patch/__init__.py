"""What restores recall: activation and path patching."""
