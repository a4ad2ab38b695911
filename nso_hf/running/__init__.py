"""What programs share: options, output folders, checkpoints, tables of data, figures and plots."""
