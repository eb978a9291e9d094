"""What a run says before work starts: what it is going to take, and a dry run's report."""
