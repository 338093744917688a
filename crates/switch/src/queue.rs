//! A port's egress queues: eight classes of priority, and in each a fair share for every port that sends.
//!
//! Classes above a line are served strictly, highest first; the rest share by weight. Within a class, frames wait in
//! one queue per sending port, served by deficit round-robin, and when the class is full it is the longest of these
//! that loses a frame: a port that floods takes nothing from its neighbours.

use std::collections::VecDeque;

use crate::frame::Frame;

/// Classes of a port.
pub const CLASSES: usize = 8;

/// Bytes by which a queue's turn grows.
const QUANTUM: u64 = 8192;

/// How a port's classes are served.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// How many of the classes, from the highest down, are served strictly.
    pub strict: u8,
    /// Shares of the other classes, lowest class first. Zero counts as one.
    pub weights: [u16; CLASSES],
    /// Bytes of memory that waiting frames of one class may occupy.
    pub class_memory: usize,
}

impl Default for QueueConfig {
    /// The two highest classes (network control and voice) strictly, the others with weights that double every other
    /// class; 2 MiB each.
    fn default() -> QueueConfig {
        QueueConfig {
            strict: 2,
            weights: [1, 2, 4, 4, 8, 8, 16, 16],
            class_memory: 2 << 20,
        }
    }
}

/// The class of a priority: the order of IEEE 802.1Q table 8-5, in which 1 (background) is below 0 (best effort).
pub fn class_of(pcp: u8) -> usize {
    match pcp & 7 {
        0 => 1,
        1 => 0,
        other => usize::from(other),
    }
}

/// What one class has done.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames taken out.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames dropped because the class was full.
    pub dropped: u64,
    /// Bytes of memory that waiting frames occupy now.
    pub waiting: usize,
}

#[derive(Debug)]
struct Flow {
    frames: VecDeque<Frame>,
    memory: usize,
    deficit: u64,
}

#[derive(Debug, Default)]
struct Class {
    /// One per sending port, by its index; made when it first sends.
    flows: Vec<Option<Flow>>,
    /// Flows with frames, in the order of their turns.
    active: VecDeque<usize>,
    deficit: u64,
    counters: QueueCounters,
}

impl Class {
    fn flow(&mut self, source: usize) -> Option<&mut Flow> {
        self.flows.get_mut(source)?.as_mut()
    }

    /// Memory that waiting frames of `source` occupy.
    fn memory_of(&self, source: usize) -> usize {
        let flow = self.flows.get(source).and_then(Option::as_ref);
        flow.map_or(0, |flow| flow.memory)
    }

    /// Puts a frame in; those that have to go for it, or itself, go to `drop`.
    fn push(&mut self, source: usize, frame: Frame, limit: usize, drop: &mut impl FnMut(Frame)) {
        let memory = frame.memory();
        while self.counters.waiting.saturating_add(memory) > limit {
            self.counters.dropped += 1;
            let own = self.memory_of(source).saturating_add(memory);
            // Whoever has more than the average already loses the new frame: the usual case, found without a search.
            let above = own.saturating_mul(self.active.len()) > self.counters.waiting;
            let longest = self.active.iter().filter(|_| !above);
            let longest = longest.map(|&index| (self.memory_of(index), index)).max();
            let longest = longest.filter(|&(waiting, index)| index != source && waiting > own);
            match longest.and_then(|(_, index)| self.drop_last(index)) {
                Some(other) => drop(other),
                None => return drop(frame),
            }
        }
        if self.flows.len() <= source {
            self.flows.resize_with(source.saturating_add(1), || None);
        }
        let Some(slot) = self.flows.get_mut(source) else {
            return;
        };
        self.counters.waiting = self.counters.waiting.saturating_add(memory);
        let flow = slot.get_or_insert_with(|| Flow {
            frames: VecDeque::new(),
            memory: 0,
            deficit: 0,
        });
        if flow.frames.is_empty() {
            self.active.push_back(source);
        }
        flow.memory = flow.memory.saturating_add(memory);
        flow.frames.push_back(frame);
    }

    fn drop_last(&mut self, source: usize) -> Option<Frame> {
        let flow = self.flow(source)?;
        let frame = flow.frames.pop_back()?;
        let memory = frame.memory();
        flow.memory = flow.memory.saturating_sub(memory);
        let empty = flow.frames.is_empty();
        self.counters.waiting = self.counters.waiting.saturating_sub(memory);
        if empty {
            self.active.retain(|&index| index != source);
        }
        Some(frame)
    }

    /// Length of the frame whose turn it is. Gives out the turn.
    fn next_len(&mut self) -> Option<u64> {
        loop {
            let source = *self.active.front()?;
            let Some(flow) = self.flows.get_mut(source).and_then(Option::as_mut) else {
                self.active.pop_front();
                continue;
            };
            let Some(len) = flow.frames.front().map(|frame| frame.len() as u64) else {
                self.active.pop_front();
                continue;
            };
            if flow.deficit >= len {
                return Some(len);
            }
            flow.deficit += QUANTUM;
            self.active.rotate_left(1);
        }
    }

    fn pop(&mut self) -> Option<Frame> {
        let len = self.next_len()?;
        let source = *self.active.front()?;
        let flow = self.flow(source)?;
        let frame = flow.frames.pop_front()?;
        let memory = frame.memory();
        flow.memory = flow.memory.saturating_sub(memory);
        flow.deficit = flow.deficit.saturating_sub(len);
        if flow.frames.is_empty() {
            flow.deficit = 0;
            self.active.pop_front();
        }
        self.counters.waiting = self.counters.waiting.saturating_sub(memory);
        self.counters.frames += 1;
        self.counters.bytes += len;
        Some(frame)
    }
}

/// The queues of one port.
#[derive(Debug)]
pub struct Queues {
    config: QueueConfig,
    classes: [Class; CLASSES],
    /// The weighted class whose turn it is.
    turn: usize,
    frames: usize,
}

impl Queues {
    /// Empty queues.
    pub fn new(config: QueueConfig) -> Queues {
        Queues {
            config,
            classes: Default::default(),
            turn: 0,
            frames: 0,
        }
    }

    /// Changes how they are served; what waits stays.
    pub fn configure(&mut self, config: QueueConfig) {
        self.config = config;
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Puts a frame from the port with index `source` into a class. Frames that have to go because the class is full,
    /// this one or others, go to `drop`. Returns how many these were.
    pub fn push(
        &mut self,
        source: usize,
        class: usize,
        frame: Frame,
        mut drop: impl FnMut(Frame),
    ) -> usize {
        let limit = self.config.class_memory;
        let mut dropped = 0usize;
        let mut count = |frame| {
            dropped += 1;
            drop(frame);
        };
        match self.classes.get_mut(class) {
            Some(target) => target.push(source, frame, limit, &mut count),
            None => count(frame),
        }
        self.frames = self.frames.saturating_add(1).saturating_sub(dropped);
        dropped
    }

    /// Takes the frame whose turn it is.
    pub fn pop(&mut self) -> Option<Frame> {
        if self.frames == 0 {
            return None;
        }
        let strict = CLASSES.saturating_sub(usize::from(self.config.strict));
        let frame = self
            .classes
            .get_mut(strict..)
            .unwrap_or_default()
            .iter_mut()
            .rev()
            .find_map(Class::pop)
            .or_else(|| self.pop_weighted(strict));
        self.frames = self.frames.saturating_sub(usize::from(frame.is_some()));
        frame
    }

    fn pop_weighted(&mut self, below: usize) -> Option<Frame> {
        let shared = self.classes.get_mut(..below)?;
        if shared.iter().all(|class| class.active.is_empty()) {
            return None;
        }
        loop {
            if self.turn >= shared.len() {
                self.turn = 0;
            }
            let class = shared.get_mut(self.turn)?;
            match class.next_len() {
                Some(len) if class.deficit >= len => {
                    class.deficit -= len;
                    return class.pop();
                }
                Some(_) => {
                    let weight = self.config.weights.get(self.turn).copied().unwrap_or(1);
                    class.deficit += u64::from(weight.max(1)) * QUANTUM;
                }
                None => class.deficit = 0,
            }
            // A class that had a turn's worth added is looked at again when its turn comes round.
            self.turn += 1;
        }
    }

    /// What each class has done, lowest first.
    pub fn counters(&self) -> [QueueCounters; CLASSES] {
        self.classes.each_ref().map(|class| class.counters)
    }

    /// Forgets what a sending port has waiting.
    pub fn forget(&mut self, source: usize) {
        for class in &mut self.classes {
            while class.drop_last(source).is_some() {
                self.frames = self.frames.saturating_sub(1);
            }
            if let Some(slot) = class.flows.get_mut(source) {
                *slot = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(len: usize, mark: u8) -> Frame {
        Frame::new(&vec![mark; len])
    }

    #[test]
    fn strict_classes_go_first_and_the_others_share_by_weight() {
        let mut queues = Queues::new(QueueConfig {
            strict: 1,
            weights: [1, 3, 1, 1, 1, 1, 1, 1],
            class_memory: 64 << 20,
        });
        for _ in 0..8000 {
            assert_eq!(queues.push(0, 0, frame(1000, 0), |_| ()), 0);
            assert_eq!(queues.push(0, 1, frame(1000, 1), |_| ()), 0);
        }
        for _ in 0..10 {
            assert_eq!(queues.push(0, 7, frame(1000, 7), |_| ()), 0);
        }
        for _ in 0..10 {
            assert_eq!(queues.pop().unwrap().bytes()[0], 7);
        }
        let mut seen = [0; 2];
        for _ in 0..4000 {
            seen[usize::from(queues.pop().unwrap().bytes()[0])] += 1;
        }
        let ratio = f64::from(seen[1]) / f64::from(seen[0]);
        assert!((2.9..3.1).contains(&ratio), "{seen:?}");
    }

    #[test]
    fn a_port_that_floods_takes_nothing_from_its_neighbour() {
        let mut queues = Queues::new(QueueConfig {
            class_memory: 200_000,
            ..QueueConfig::default()
        });
        let mut taken = [0; 2];
        let mut lost = [0; 2];
        // The line takes two frames per round. One port wants one, the other a hundred.
        for round in 0..2000 {
            for (port, count) in [(0u8, 100), (1u8, 1)] {
                for _ in 0..count {
                    queues.push(port.into(), 1, frame(1400, port), |dropped| {
                        lost[usize::from(dropped.bytes()[0])] += 1;
                    });
                }
            }
            for _ in 0..2 {
                taken[usize::from(queues.pop().unwrap().bytes()[0])] += 1;
            }
            assert!(queues.counters()[1].waiting <= 200_000, "round {round}");
        }
        assert_eq!(lost[1], 0);
        assert!(taken[1] >= 1990, "{taken:?}");
    }

    #[test]
    fn what_is_pushed_comes_out_once() {
        let mut queues = Queues::new(QueueConfig::default());
        for index in 0..64u8 {
            for port in 0..5 {
                assert_eq!(
                    queues.push(
                        port,
                        usize::from(index % 8),
                        frame(60 + usize::from(index) * 900, index),
                        |_| ()
                    ),
                    0
                );
            }
        }
        queues.forget(4);
        let mut count = 0;
        while queues.pop().is_some() {
            count += 1;
        }
        assert_eq!(count, 64 * 4);
        assert!(queues.is_empty());
        assert!(queues.counters().iter().all(|class| class.waiting == 0));
    }
}
