"""Inputs as users have them: seeded damages of small sources, and the recorded cases of `../shared/cases`."""
