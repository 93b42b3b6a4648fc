"""`python -m moebius_bench.hardware`."""

from moebius_bench.hardware.cli import main

if __name__ == "__main__":
    main()
