"""What a run says about itself: metrics while it trains, and a report afterwards."""
