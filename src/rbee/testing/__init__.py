"""What tests of rbee, ours and yours, are made with."""
