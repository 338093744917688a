//! The control socket: how other processes ask a running machine.
//!
//! A Unix stream socket in the machine's run directory. Both sides send lines of JSON. The machine speaks first and
//! greets with the protocol's name, its version and what it can do; the client answers with `hello` and the version it
//! speaks, and then sends requests, each with an id that its answer carries:
//!
//! ```text
//! < {"protocol":"strata-control","version":1,"capabilities":["status",...],"machine":"tiny-1a2b"}
//! > {"id":1,"request":"hello","version":1}
//! < {"id":1,"ok":{"version":1}}
//! > {"id":2,"request":"status"}
//! < {"id":2,"ok":{"name":"tiny-1a2b","state":"running",...}}
//! > {"id":3,"request":"fly"}
//! < {"id":3,"error":{"kind":"unknown-request","message":"there is no request 'fly'"}}
//! ```
//!
//! Unknown fields are ignored on both sides, so that later versions can add some.

mod client;
mod protocol;
mod server;

pub use client::{Client, ClientError};
pub use protocol::{
    CAPABILITIES, ErrorKind, Failure, Greeting, LINE_MAX, PROTOCOL, Request, Session, Status, Step,
    VERSION,
};
pub use server::{ControlRequest, Server};
