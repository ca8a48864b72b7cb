"""Is the loaded model what it claims to be: `check_model`, and the check of every model as it is loaded."""
