"""What each step does. One folder per component; none knows another."""
