//! What a machine and a hub say to each other before frames go: one message each way over a Unix socket that keeps
//! message boundaries, with the ring's descriptors in the answer.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use strata_switch::packet::Mac;
use strata_switch::{Capabilities, Vid, VidSet, VlanMode};

/// Version of the messages.
pub(crate) const VERSION: u32 = 2;
/// Bytes of a message; one that is longer is cut and then refused.
const MESSAGE_MAX: usize = 32 << 10;
/// Descriptors of an answer: the ring's memory, and by what either side wakes the other.
pub(crate) const DESCRIPTORS: usize = 2;

/// Why a machine could not join.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The connection failed.
    #[error("the connection to the network failed")]
    Connection(#[from] io::Error),
    /// The other side said something else.
    #[error("the other side does not speak the protocol of networks: {0}")]
    Message(&'static str),
    /// Another version.
    #[error(
        "the network is of version {0}, this program knows version {VERSION}: update the older side"
    )]
    Version(u32),
    /// The network refused.
    #[error("the network refused the port: {0}")]
    Refused(String),
    /// The ring is unusable.
    #[error(transparent)]
    Ring(#[from] strata_switch::ring::RingError),
}

/// Which VLANs a port has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vlans {
    /// One, untagged.
    Access(u16),
    /// Several, tagged; all, if none are named.
    Trunk(Vec<u16>),
}

impl Vlans {
    /// As the switch has it. `None`: a number that no VLAN has.
    pub(crate) fn mode(&self) -> Option<VlanMode> {
        match self {
            Vlans::Access(vid) => Vid::new(*vid).map(VlanMode::Access),
            Vlans::Trunk(vids) if vids.is_empty() => Some(VlanMode::Trunk {
                native: None,
                allowed: VidSet::all(),
            }),
            Vlans::Trunk(vids) => {
                let allowed: Option<VidSet> = vids
                    .iter()
                    .map(|vid| Vid::new(*vid))
                    .collect::<Option<Vec<_>>>()
                    .map(|vids| vids.into_iter().collect());
                Some(VlanMode::Trunk {
                    native: None,
                    allowed: allowed?,
                })
            }
        }
    }
}

/// The port that a machine wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRequest {
    /// The machine's name: in statistics, captures and DNS.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its VLANs.
    pub vlans: Vlans,
    /// Longest IP packet that it takes.
    pub mtu: u16,
    /// Whether it takes frames with a missing checksum, and unsegmented TCP over IPv4 and IPv6, and UDP.
    pub offloads: [bool; 4],
}

impl PortRequest {
    pub(crate) fn mac(&self) -> Mac {
        Mac::from_bytes(&self.mac)
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        let [checksum, tcp4, tcp6, udp] = self.offloads;
        Capabilities {
            checksum,
            tcp4,
            tcp6,
            udp,
        }
    }
}

/// What a machine says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    pub(crate) port: PortRequest,
}

/// What the hub answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) version: u32,
    /// Bytes of each direction of the ring.
    pub(crate) ring: u32,
    /// The network's MTU, which the machine's card is to have.
    pub(crate) mtu: u16,
    /// Why there is no port, if there is none.
    pub(crate) refused: Option<String>,
}

/// Sends one message with descriptors.
pub(crate) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ProtocolError> {
    let text = serde_json::to_vec(message).map_err(io::Error::from)?;
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(
        socket,
        &[IoSlice::new(&text)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map_err(io::Error::from)?;
    Ok(())
}

/// Receives one message with its descriptors. `None`: the other side has gone.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> Result<Option<(T, Vec<OwnedFd>)>, ProtocolError> {
    let mut text = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(io::Error::from)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            descriptors.extend(files);
        }
    }
    let text = text.get(..received.bytes).unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    let message = serde_json::from_slice(text)
        .map_err(|_| ProtocolError::Message("it is no message that we know"))?;
    Ok(Some((message, descriptors)))
}
