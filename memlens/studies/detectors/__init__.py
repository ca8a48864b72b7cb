"""The detectors, side by side: what each tells of recall beyond copies and other confounds."""
