"""What training takes, told before it begins."""
