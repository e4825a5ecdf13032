"""What every part may use: locked folders, CPU threads."""
