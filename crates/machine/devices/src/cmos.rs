//! The CMOS real-time clock (MC146818) with its 128 bytes of battery-backed memory. Alarms and periodic interrupts do
//! not exist: systems with this machine's ACPI tables take their timers from elsewhere.

use crate::{BusDevice, Device, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

const KIND: &str = "cmos-rtc";
const MEMORY: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Status A: an update is in progress. It precedes the update by 244 µs.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
const UPDATE_NANOS: u32 = 1_000_000_000 - 244_000;
/// Status A: a 32,768 Hz time base and the periodic rate that PC firmware sets.
const STATUS_A_RESET: u8 = 0x26;
/// Status B: the guest is setting the time, updates are held.
const SET: u8 = 1 << 7;
/// Status B: numbers are binary instead of BCD.
const BINARY: u8 = 1 << 2;
/// Status B: hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Status D: time and memory are valid.
const VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

/// Where the time comes from: the time since 1970-01-01 00:00:00, in the time zone that the guest's clock runs in.
pub type WallClock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The clock, two ports.
pub struct Cmos {
    now: WallClock,
    state: State,
}

/// The runtime state is what is saved.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct State {
    index: u8,
    status_a: u8,
    status_b: u8,
    /// The guest's clock minus the host's, seconds: what the guest has set.
    offset: i64,
    /// The time while the guest sets it.
    held: Option<Calendar>,
    /// All bytes that have no meaning here.
    memory: Vec<u8>,
}

/// A time of day and date, as the registers count them. Fields hold whatever the guest wrote.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct Calendar {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    year: u8,
    century: u8,
}

impl Calendar {
    /// Seconds since 1970, by the proleptic Gregorian calendar.
    fn from_unix(time: i64) -> Calendar {
        let (days, seconds) = (time.div_euclid(86_400), time.rem_euclid(86_400));
        // Years begin in March here, so that the leap day is the last; an era is 400 years.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Calendar {
            second: (seconds % 60) as u8,
            minute: (seconds / 60 % 60) as u8,
            hour: (seconds / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            month: month as u8,
            year: year.rem_euclid(100) as u8,
            century: (year.div_euclid(100)).rem_euclid(100) as u8,
        }
    }

    /// The inverse; fields out of range carry over into the next, so that every content means some time.
    fn to_unix(self) -> i64 {
        let year = i64::from(self.century) * 100 + i64::from(self.year);
        let month = i64::from(self.month);
        let march_year = year - i64::from(month <= 2);
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let (era, year_of_era) = (march_year.div_euclid(400), march_year.rem_euclid(400));
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        let hours = days * 24 + i64::from(self.hour);
        (hours * 60 + i64::from(self.minute)) * 60 + i64::from(self.second)
    }

    fn field(&mut self, register: u8) -> Option<&mut u8> {
        Some(match register {
            SECONDS => &mut self.second,
            MINUTES => &mut self.minute,
            HOURS => &mut self.hour,
            WEEKDAY => &mut self.weekday,
            DAY => &mut self.day,
            MONTH => &mut self.month,
            YEAR => &mut self.year,
            CENTURY => &mut self.century,
            _ => return None,
        })
    }
}

impl State {
    fn new() -> State {
        State {
            index: 0,
            status_a: STATUS_A_RESET,
            status_b: HOURS_24,
            offset: 0,
            held: None,
            memory: vec![0; MEMORY],
        }
    }

    /// A number as the guest chose to see it.
    fn encode(&self, register: u8, value: u8) -> u8 {
        let (value, afternoon) = match register {
            HOURS if self.status_b & HOURS_24 == 0 => (
                (value + 11) % 12 + 1,
                if value % 24 >= 12 { HOUR_PM } else { 0 },
            ),
            _ => (value, 0),
        };
        let value = if self.status_b & BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        };
        value | afternoon
    }

    /// The inverse, never above 199.
    fn decode(&self, register: u8, value: u8) -> u8 {
        let twelve = register == HOURS && self.status_b & HOURS_24 == 0;
        let (value, afternoon) = if twelve {
            (value & !HOUR_PM, value & HOUR_PM != 0)
        } else {
            (value, false)
        };
        let value = if self.status_b & BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        };
        match twelve {
            true => value % 12 + if afternoon { 12 } else { 0 },
            false => value.min(199),
        }
    }
}

impl Cmos {
    /// First port.
    pub const BASE: u64 = 0x70;
    /// Number of ports.
    pub const LEN: u64 = 2;

    /// A clock that runs as `now` does.
    pub fn new(now: WallClock) -> Cmos {
        Cmos {
            now,
            state: State::new(),
        }
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from((self.now)().as_secs()).unwrap_or(0)
    }

    fn calendar(&self) -> Calendar {
        let running = || Calendar::from_unix(self.host_seconds().saturating_add(self.state.offset));
        self.state.held.unwrap_or_else(running)
    }

    fn set_calendar(&mut self, calendar: Calendar) {
        self.state.offset = calendar.to_unix().saturating_sub(self.host_seconds());
    }

    fn read_register(&self) -> u8 {
        let state = &self.state;
        let mut calendar = self.calendar();
        match state.index {
            STATUS_A => {
                let late = (self.now)().subsec_nanos() >= UPDATE_NANOS;
                let updating = late && state.held.is_none();
                state.status_a | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            STATUS_B => state.status_b,
            // No interrupt is ever pending.
            STATUS_C => 0,
            STATUS_D => VALID,
            index => match calendar.field(index) {
                Some(field) => state.encode(index, *field),
                None => state
                    .memory
                    .get(usize::from(index))
                    .copied()
                    .unwrap_or(0xff),
            },
        }
    }

    fn write_register(&mut self, value: u8) {
        let mut calendar = self.calendar();
        match self.state.index {
            STATUS_A => self.state.status_a = value & !UPDATE_IN_PROGRESS,
            STATUS_B => {
                self.state.status_b = value;
                match (value & SET != 0, self.state.held) {
                    (true, None) => self.state.held = Some(calendar),
                    (false, Some(held)) => {
                        self.set_calendar(held);
                        self.state.held = None;
                    }
                    _ => {}
                }
            }
            STATUS_C | STATUS_D => {}
            index => {
                if let Some(field) = calendar.field(index) {
                    *field = self.state.decode(index, value);
                    match &mut self.state.held {
                        Some(held) => *held = calendar,
                        None => self.set_calendar(calendar),
                    }
                } else if let Some(byte) = self.state.memory.get_mut(usize::from(index)) {
                    *byte = value;
                }
            }
        }
    }
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(offset..) {
            // The index port cannot be read.
            *byte = if port == 1 {
                self.read_register()
            } else {
                0xff
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (&byte, port) in data.iter().zip(offset..) {
            match port {
                // Bit 7 masks NMIs on a PC; there are none from the chipset here.
                0 => self.state.index = byte & 0x7f,
                _ => self.write_register(byte),
            }
        }
    }
}

impl Device for Cmos {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&mut self) {
        // The battery keeps time and memory.
        let memory = std::mem::take(&mut self.state.memory);
        if let Some(held) = self.state.held {
            self.set_calendar(held);
        }
        self.state = State {
            memory,
            offset: self.state.offset,
            ..State::new()
        };
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND, 1, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.open(KIND, 1)?;
        if state.memory.len() != MEMORY {
            let reason = "another size of memory";
            return Err(RestoreError::Mismatch {
                name: KIND.to_owned(),
                reason,
            });
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{access, accesses};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// 2026-11-21 09:34:05 UTC, a Saturday.
    const TIME: u64 = 1_795_253_645;

    fn clock(nanos: u64) -> (Arc<AtomicU64>, Cmos) {
        let time = Arc::new(AtomicU64::new(nanos));
        let source = time.clone();
        let now = Arc::new(move || Duration::from_nanos(source.load(Ordering::Relaxed)));
        (time, Cmos::new(now))
    }

    fn get(cmos: &mut Cmos, register: u8) -> u8 {
        let mut data = [0];
        cmos.write(0, &[register]);
        cmos.read(1, &mut data);
        data[0]
    }

    fn put(cmos: &mut Cmos, register: u8, value: u8) {
        cmos.write(0, &[register]);
        cmos.write(1, &[value]);
    }

    fn shown(cmos: &mut Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|r| get(cmos, r))
    }

    #[test]
    fn the_time_is_shown_in_all_formats() {
        let (time, mut cmos) = clock(TIME * 1_000_000_000);
        assert_eq!(
            shown(&mut cmos),
            [0x20, 0x26, 0x11, 0x21, 0x09, 0x34, 0x05, 7]
        );
        put(&mut cmos, STATUS_B, BINARY | HOURS_24);
        assert_eq!(shown(&mut cmos), [20, 26, 11, 21, 9, 34, 5, 7]);
        time.store((TIME + 4 * 3600) * 1_000_000_000, Ordering::Relaxed);
        put(&mut cmos, STATUS_B, 0);
        assert_eq!(get(&mut cmos, HOURS), 0x81);
        assert_eq!(get(&mut cmos, STATUS_D), 0x80);
    }

    #[test]
    fn an_update_announces_itself() {
        let (time, mut cmos) = clock(TIME * 1_000_000_000);
        assert_eq!(get(&mut cmos, STATUS_A), 0x26);
        time.fetch_add(999_900_000, Ordering::Relaxed);
        assert_eq!(get(&mut cmos, STATUS_A), 0xa6);
        put(&mut cmos, STATUS_B, SET | HOURS_24);
        assert_eq!(get(&mut cmos, STATUS_A), 0x26);
    }

    #[test]
    fn a_time_that_was_set_goes_on() {
        let (time, mut cmos) = clock(TIME * 1_000_000_000);
        put(&mut cmos, STATUS_B, SET | HOURS_24);
        for (register, value) in [
            (CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
        ] {
            put(&mut cmos, register, value);
        }
        time.fetch_add(5_000_000_000, Ordering::Relaxed);
        assert_eq!(
            shown(&mut cmos)[..7],
            [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
        );
        put(&mut cmos, STATUS_B, HOURS_24);
        time.fetch_add(3_000_000_000, Ordering::Relaxed);
        assert_eq!(
            shown(&mut cmos),
            [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01, 7]
        );
        put(&mut cmos, 0x40, 0x99);
        cmos.reset();
        assert_eq!(
            (get(&mut cmos, CENTURY), get(&mut cmos, 0x40)),
            (0x20, 0x99)
        );
    }

    proptest! {
        #[test]
        fn calendars_and_unix_time_agree(time in -2_208_988_800i64..250_000_000_000) {
            prop_assert_eq!(Calendar::from_unix(time).to_unix(), time);
        }

        #[test]
        fn hours_survive_both_formats(hour in 0u8..24, format in 0u8..8) {
            let state = State { status_b: format, ..State::new() };
            prop_assert_eq!(state.decode(HOURS, state.encode(HOURS, hour)), hour);
        }

        #[test]
        fn any_accesses(accesses in accesses(Cmos::LEN), time in any::<u64>()) {
            let (_, mut cmos) = clock(time);
            for each in &accesses {
                access(&mut cmos, each);
            }
            let (_, mut copy) = clock(time);
            copy.restore(&cmos.save()).unwrap();
            prop_assert_eq!(&copy.state, &cmos.state);
            cmos.reset();
        }
    }
}
