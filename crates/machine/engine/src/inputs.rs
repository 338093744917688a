//! The one door for non-determinism: what is not a function of architectural state enters a vCPU through [`Inputs`].
//!
//! A live vCPU computes each input and goes on. A recording one appends it to an [`InputLog`]; a replaying one takes
//! it from there and never asks the host. Interrupts, kicks and device writes to RAM carry the count of retired
//! instructions at which they arrived, so that a run with other block lengths takes them at the same instruction.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// One input. Sizes in bytes, values little endian in the low bytes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// RDTSC and friends.
    Tsc(u64),
    /// RDRAND or RDSEED: the value and the carry flag.
    Random(u64, bool),
    /// A read of an I/O port.
    PortIn {
        /// The port.
        port: u16,
        /// What was read.
        value: u32,
    },
    /// A read of device memory.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// What was read.
        value: u64,
    },
    /// A read of a register that runs with time (a timer's count, a paravirtual clock).
    Clock(u64),
    /// An interrupt was accepted after `at` retired instructions.
    Interrupt {
        /// Retired instructions.
        at: u64,
        /// The vector.
        vector: u8,
    },
    /// A device wrote guest RAM; visible after `at` retired instructions.
    DeviceWrite {
        /// Retired instructions.
        at: u64,
        /// Guest-physical address.
        gpa: u64,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// The soft TLB was flushed for a reason outside the instruction stream.
    TlbFlush {
        /// Retired instructions.
        at: u64,
    },
}

/// A replay asked for something else than what was recorded.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InputError {
    /// The log ended.
    #[error("the recording ended at input {0}")]
    Ended(u64),
    /// The next recorded input is of another kind.
    #[error("input {index}: the run asks for {asked}, the recording has {recorded:?}")]
    Mismatch {
        /// Position in the log, from 0.
        index: u64,
        /// What the run asked for.
        asked: &'static str,
        /// What the log holds.
        recorded: Input,
    },
}

/// Recorded inputs, oldest first.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct InputLog {
    /// The inputs.
    pub inputs: VecDeque<Input>,
}

/// Where a vCPU's inputs come from.
#[derive(Debug, Default)]
pub enum Inputs {
    /// From the host; nothing is kept.
    #[default]
    Live,
    /// From the host; each one is appended.
    Record(InputLog),
    /// From a recording; `taken` counts what was used.
    Replay {
        /// What is left.
        log: InputLog,
        /// Inputs taken so far.
        taken: u64,
    },
}

impl Inputs {
    /// Replays `log` from its start.
    pub fn replay(log: InputLog) -> Self {
        Inputs::Replay { log, taken: 0 }
    }

    /// True if nothing may be asked of the host.
    pub fn is_replay(&self) -> bool {
        matches!(self, Inputs::Replay { .. })
    }

    /// True if neither recording nor replaying.
    pub fn is_live(&self) -> bool {
        matches!(self, Inputs::Live)
    }

    /// Takes one input: `live` computes it from the host, `make` wraps it for the log and `open` unwraps it again.
    pub fn take<T: Copy>(
        &mut self,
        asked: &'static str,
        live: impl FnOnce() -> T,
        make: impl FnOnce(T) -> Input,
        open: impl FnOnce(&Input) -> Option<T>,
    ) -> Result<T, InputError> {
        match self {
            Inputs::Live => Ok(live()),
            Inputs::Record(log) => {
                let value = live();
                log.inputs.push_back(make(value));
                Ok(value)
            }
            Inputs::Replay { log, taken } => {
                let input = log.inputs.pop_front().ok_or(InputError::Ended(*taken))?;
                let index = *taken;
                *taken += 1;
                open(&input).ok_or(InputError::Mismatch {
                    index,
                    asked,
                    recorded: input,
                })
            }
        }
    }

    /// Appends an input that arrived from outside. No effect unless recording.
    pub fn arrived(&mut self, input: Input) {
        if let Inputs::Record(log) = self {
            log.inputs.push_back(input);
        }
    }

    /// In replay, the next recorded input without taking it.
    pub fn peek(&self) -> Option<&Input> {
        match self {
            Inputs::Replay { log, .. } => log.inputs.front(),
            _ => None,
        }
    }

    /// In replay, the retired-instruction count of the next asynchronous input, if that is what comes next.
    pub fn next_arrival(&self) -> Option<u64> {
        match self.peek()? {
            Input::Interrupt { at, .. }
            | Input::DeviceWrite { at, .. }
            | Input::TlbFlush { at } => Some(*at),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tsc(inputs: &mut Inputs, live: u64) -> Result<u64, InputError> {
        inputs.take(
            "tsc",
            || live,
            Input::Tsc,
            |i| {
                if let Input::Tsc(v) = i {
                    Some(*v)
                } else {
                    None
                }
            },
        )
    }

    #[test]
    fn a_replay_gives_what_was_recorded_and_names_what_differs() {
        let mut record = Inputs::Record(InputLog::default());
        tsc(&mut record, 7).unwrap();
        record.arrived(Input::Interrupt {
            at: 10,
            vector: 0x30,
        });
        let Inputs::Record(log) = record else {
            panic!()
        };
        let mut replay = Inputs::replay(log);
        assert_eq!(tsc(&mut replay, 99), Ok(7));
        assert_eq!(replay.next_arrival(), Some(10));
        assert!(matches!(
            tsc(&mut replay, 99),
            Err(InputError::Mismatch { index: 1, .. })
        ));
        assert_eq!(tsc(&mut replay, 99), Err(InputError::Ended(2)));
    }
}
