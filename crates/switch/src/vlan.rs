//! VLANs: which one a frame belongs to, and how it leaves.

use std::fmt;

/// A VLAN identifier, 1 to 4,094 (IEEE 802.1Q clause 9.6).
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vid(u16);

impl Vid {
    /// The VLAN of a switch that has no others.
    pub const DEFAULT: Vid = Vid(1);
    /// The largest.
    pub const LAST: Vid = Vid(4094);

    /// `None` for 0 and 4,095, which name no VLAN, and beyond.
    pub const fn new(id: u16) -> Option<Vid> {
        match id {
            1..=4094 => Some(Vid(id)),
            _ => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for Vid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vlan {}", self.0)
    }
}

impl fmt::Display for Vid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VidSet(Box<[u64; 64]>);

impl VidSet {
    /// None.
    pub fn none() -> VidSet {
        VidSet(Box::new([0; 64]))
    }

    /// All 4,094.
    pub fn all() -> VidSet {
        (1..=4094).filter_map(Vid::new).collect()
    }

    /// Adds one.
    pub fn insert(&mut self, vid: Vid) {
        if let Some(word) = self.0.get_mut(usize::from(vid.0 / 64)) {
            *word |= 1 << (vid.0 % 64);
        }
    }

    /// Whether it is in the set.
    pub fn contains(&self, vid: Vid) -> bool {
        self.0
            .get(usize::from(vid.0 / 64))
            .is_some_and(|word| word & (1 << (vid.0 % 64)) != 0)
    }
}

impl FromIterator<Vid> for VidSet {
    fn from_iter<T: IntoIterator<Item = Vid>>(vids: T) -> VidSet {
        let mut set = VidSet::none();
        vids.into_iter().for_each(|vid| set.insert(vid));
        set
    }
}

impl fmt::Debug for VidSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vids = (1..=4094).filter_map(Vid::new);
        f.debug_set()
            .entries(vids.filter(|&vid| self.contains(vid)))
            .finish()
    }
}

/// How a port takes part in VLANs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VlanMode {
    /// Untagged frames of one VLAN. A tag with VLAN 0 gives a frame its priority and is taken off; any other tag is
    /// refused.
    Access(Vid),
    /// Tagged frames of several VLANs, and untagged ones of the native VLAN, if there is one.
    Trunk {
        /// Where untagged frames belong; frames of this VLAN leave untagged.
        native: Option<Vid>,
        /// The VLANs that pass. The native one is among them without being named.
        allowed: VidSet,
    },
    /// A customer's port (802.1ad): all frames belong to one VLAN, and the tags that they have are payload.
    Tunnel(Vid),
}

impl Default for VlanMode {
    fn default() -> VlanMode {
        VlanMode::Access(Vid::DEFAULT)
    }
}

/// What to do to a frame that came in.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Classified {
    /// The VLAN it belongs to.
    pub vid: Vid,
    /// Its priority, if a tag said one.
    pub pcp: Option<u8>,
    /// Whether its outermost tag is to be taken off.
    pub strip: bool,
}

impl VlanMode {
    /// Whether frames of `vid` pass this port.
    pub fn carries(&self, vid: Vid) -> bool {
        match self {
            VlanMode::Access(own) | VlanMode::Tunnel(own) => *own == vid,
            VlanMode::Trunk { native, allowed } => *native == Some(vid) || allowed.contains(vid),
        }
    }

    /// The VLAN of a frame with this outermost tag (protocol and control). `None`: it may not pass.
    pub fn classify(&self, tag: Option<(u16, u16)>) -> Option<Classified> {
        let untagged = |vid| Classified {
            vid,
            pcp: None,
            strip: false,
        };
        if let VlanMode::Tunnel(vid) = self {
            return Some(Classified {
                pcp: tag.map(|(_, control)| pcp(control)),
                ..untagged(*vid)
            });
        }
        let native = match self {
            VlanMode::Access(vid) | VlanMode::Tunnel(vid) => Some(*vid),
            VlanMode::Trunk { native, .. } => *native,
        };
        let Some((_, control)) = tag else {
            return native.map(untagged);
        };
        let vid = match Vid::new(control & 0xfff) {
            None if control & 0xfff == 0 => native?,
            Some(vid) if matches!(self, VlanMode::Trunk { .. }) => vid,
            _ => return None,
        };
        self.carries(vid).then_some(Classified {
            vid,
            pcp: Some(pcp(control)),
            strip: true,
        })
    }

    /// The control field of the tag with which a frame leaves; `None`: it leaves without.
    pub fn egress_tag(&self, vid: Vid, pcp: u8) -> Option<u16> {
        match self {
            VlanMode::Trunk { native, .. } if *native != Some(vid) => {
                Some(u16::from(pcp & 7) << 13 | vid.0)
            }
            _ => None,
        }
    }
}

fn pcp(control: u16) -> u8 {
    (control >> 13) as u8
}
