"""What runs in an image while it is made."""
