"""What the papers predict, in numbers and in words."""
