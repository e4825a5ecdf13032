"""An OpenAI-compatible server over the one engine: `lenvm serve`. The extra ``serving`` brings what it needs."""
