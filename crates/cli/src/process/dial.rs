//! Connecting in the user's name: a guest's program wants a port of the host, and the process in front connects to it.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};

/// The answer if nobody listens there.
const REFUSED: u8 = 0;
/// The answer that comes with a socket.
const CONNECTED: u8 = 1;

/// In the machine's process: asks for a connection to a port of the host.
pub fn ask(line: &UnixStream, port: u32) -> io::Result<UnixStream> {
    rustix::io::write(line, &port.to_le_bytes())?;
    let mut answer = [REFUSED];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut answer)];
    let got = recvmsg(line, &mut buffers, &mut received, RecvFlags::CMSG_CLOEXEC)?;
    let socket = received.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    match (got.bytes, answer, socket) {
        (1, [CONNECTED], Some(socket)) => Ok(UnixStream::from(socket)),
        _ => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

/// In the process in front: connects to the Unix socket of each port that is asked for, until the machine is gone.
pub fn serve(mut line: UnixStream, base: &Path) {
    let mut port = [0; 4];
    while line.read_exact(&mut port).is_ok() {
        let mut path = OsString::from(base);
        path.push(format!("_{}", u32::from_le_bytes(port)));
        if answer(&line, dial(Path::new(&path)).ok().as_ref()).is_err() {
            return;
        }
    }
}

fn dial(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn answer(line: &UnixStream, socket: Option<&OwnedFd>) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut sent = SendAncillaryBuffer::new(&mut space);
    let sockets: Vec<_> = socket.iter().map(|socket| socket.as_fd()).collect();
    let word = if sockets.is_empty() {
        REFUSED
    } else {
        sent.push(SendAncillaryMessage::ScmRights(&sockets));
        CONNECTED
    };
    let word = [word];
    sendmsg(line, &[IoSlice::new(&word)], &mut sent, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_port_is_a_socket_if_somebody_listens() {
        let dir = std::env::temp_dir().join(format!("strata-dial-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let base = dir.join("v");
        let listener = UnixListener::bind(dir.join("v_7")).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = std::thread::spawn(move || serve(theirs, &base));
        assert!(ask(&ours, 8).is_err());
        let mut to_host = ask(&ours, 7).unwrap();
        let (mut from_guest, _) = listener.accept().unwrap();
        to_host.write_all(b"x").unwrap();
        let mut byte = [0];
        from_guest.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        drop(ours);
        served.join().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
