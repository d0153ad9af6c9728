"""From photos, masks and captions to a batch: tiles, marks, boxes, prompt text, groups. Interface first; see below."""
