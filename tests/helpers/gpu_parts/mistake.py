"""A part of the GPU check that ends with a user's mistake."""

import sys

if __name__ == "__main__":
    print("PyTorch finds no CUDA device", file=sys.stderr)
    sys.exit(2)
