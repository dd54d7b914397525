"""Text and scores from a trained model, in any layout."""
