"""What several passes need."""
