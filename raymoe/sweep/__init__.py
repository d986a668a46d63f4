"""Many runs over one question, with Ray Tune; what they share is made once, before."""
