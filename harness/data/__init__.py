"""From rows to token ids: pairs, splits, chat format, batch plan."""
