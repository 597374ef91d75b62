"""Demo: an invented bridge and a guided tour, so that the product can be seen at work without WhatsApp."""
