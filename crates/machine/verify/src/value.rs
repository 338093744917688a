//! What is known of a register's value.

use std::collections::HashMap;

/// A value: the same number is the same value, whatever it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, PartialOrd, Ord)]
pub struct Value(u32);

/// Which tags of the soft TLB.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, PartialOrd, Ord)]
pub enum Tags {
    Read,
    Write,
}

/// Memory that an address leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub struct Window {
    /// Bytes from the address on.
    pub size: u32,
    /// Stores are allowed.
    pub write: bool,
}

/// How a value came about.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub enum Def {
    /// Anything that the guest may know.
    Any(u32),
    /// Something that may say where things are in the host, but for its low bytes.
    Secret { number: u32, clean: u8 },
    /// This number.
    Const(u64),
    /// Anything up to this.
    UpTo { max: u64, number: u32 },
    /// The soft-TLB index of an address.
    Index(Value),
    /// The tag at that index.
    Tag { tags: Tags, of: Value },
    /// Tag + address + `last`.
    TagSum { tags: Tags, of: Value, last: u32 },
    /// The page number of that: zero if an access of `last` + 1 bytes hits.
    TagPage { tags: Tags, of: Value, last: u32 },
    /// The delta at the address's index.
    Delta(Value),
    /// The host address of a checked operand.
    Host { window: Window, number: u32 },
    /// Two values whose sum is the host address of a checked operand: the first of them.
    Base { window: Window, number: u32 },
    /// The second of them.
    Offset { number: u32 },
    /// An address, turned by 12 bits to the right.
    Turned(Value),
    /// That + the address: the jump-cache index of the address is its low bits.
    Mixed(Value),
    /// The jump-cache index of an address.
    JumpIndex(Value),
    /// The tag at that index.
    JumpTag(Value),
    /// Tag + address.
    JumpSum(Value),
    /// The tag at a constant index.
    SlotTag(u64),
    /// Tag at a constant index + an address that has this index.
    SlotSum(u64),
}

/// What a passed check says; it holds until memory may change under it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, PartialOrd, Ord)]
pub enum Fact {
    /// The soft TLB has the address for an access of `last` + 1 bytes in its page.
    Hit { tags: Tags, of: Value, last: u32 },
    /// The jump cache has the address.
    Jump(Value),
    /// The jump cache's entry is one for an address with its index.
    Slot(u64),
}

/// All values of a block.
#[derive(Default)]
pub struct Values {
    defs: Vec<Def>,
    known: HashMap<Def, Value>,
    numbers: u32,
}

impl Values {
    /// How a value came about.
    pub fn def(&self, value: Value) -> Def {
        let secret = Def::Secret {
            number: u32::MAX,
            clean: 0,
        };
        self.defs.get(value.0 as usize).copied().unwrap_or(secret)
    }

    /// The value of that origin.
    pub fn of(&mut self, def: Def) -> Value {
        if let Some(&value) = self.known.get(&def) {
            return value;
        }
        let value = self.new_value(def);
        self.known.insert(def, value);
        value
    }

    fn new_value(&mut self, def: Def) -> Value {
        let value = Value(self.defs.len() as u32);
        self.defs.push(def);
        value
    }

    /// A number that no value has yet.
    pub fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// A new value of which nothing is known.
    pub fn any(&mut self) -> Value {
        let number = self.number();
        self.new_value(Def::Any(number))
    }

    /// A new value that the guest must not learn, but for `clean` low bytes.
    pub fn secret(&mut self, clean: u8) -> Value {
        let number = self.number();
        self.new_value(Def::Secret { number, clean })
    }

    /// How many low bytes of the value the guest may learn.
    pub fn clean(&self, value: Value) -> u8 {
        match self.def(value) {
            Def::Secret { clean, .. } => clean,
            Def::Delta(_) | Def::Host { .. } | Def::Base { .. } | Def::Offset { .. } => 0,
            _ => 8,
        }
    }

    /// True if what is known of the value may end with a call: it speaks of the caches' contents.
    pub fn fleeting(&self, value: Value) -> bool {
        !matches!(
            self.def(value),
            Def::Any(_)
                | Def::Secret { .. }
                | Def::Const(_)
                | Def::UpTo { .. }
                | Def::Index(_)
                | Def::Turned(_)
                | Def::Mixed(_)
                | Def::JumpIndex(_)
        )
    }
}
