"""What upstream wrote in Triton. Nothing here needs Triton."""
