"""What tests, benchmarks and the training of the demo model share: the pack as a package, and a small ComfyUI world."""
