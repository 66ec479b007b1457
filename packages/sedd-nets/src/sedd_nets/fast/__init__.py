"""What exists for memory or speed alone; each function stands beside the plain formula that it is tested against."""
