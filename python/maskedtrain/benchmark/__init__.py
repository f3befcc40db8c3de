"""What masks save on this machine: rows of paired times, their verdicts, and figures of them."""
