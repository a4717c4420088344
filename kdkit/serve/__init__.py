"""A model of transformers behind the OpenAI protocol, so that a teacher can sit on another machine."""
