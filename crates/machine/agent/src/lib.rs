//! The protocol between a host and the agent inside a guest.
