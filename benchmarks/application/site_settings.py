"""Settings of a Django site without applications and database; its URLs, too."""

SECRET_KEY = "secret"  # noqa: S105 -- of a site that nobody visits
DEBUG = True
USE_TZ = True
ROOT_URLCONF = "site_settings"
WSGI_APPLICATION = "site_wsgi.application"
urlpatterns: list[object] = []
