"""What autograd keeps, and how."""
