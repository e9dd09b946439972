"""Classification and regression tasks: data sets, metrics, and models with a head. Import from the modules."""
