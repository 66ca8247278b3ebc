"""What computes behind the gateway: in this process, in a child process, or at an address."""
