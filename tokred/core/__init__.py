"""What every wing is made of: reductions, sites, methods and their registry, schedules, matching and selection."""
