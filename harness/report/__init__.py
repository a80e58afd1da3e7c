"""From a study folder to pages: report and dashboard. Imports neither torch nor Hydra."""
