"""How much disturbance recall withstands."""
