"""What runs inside the sandbox: standard library only, relative imports only, because it is copied there as it is."""
