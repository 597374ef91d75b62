"""The program for Django's server: a thread does the work."""

import threading

import work
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
threading.Thread(target=work.serve, daemon=True).start()
