"""Other people's programs that rbee is compared with: their exact versions, and what drives them."""
