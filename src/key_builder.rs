//! Keys made of what an operation is, for clients and workers that need one.
//!
//! Who tries again has to come with the same key, and who wants another thing
//! with another. There are three ways to a key, the best first:
//!
//! 1. **The operation has a name already**: an order and its version
//!    ([`payment()`]), an event ([`webhook()`]), a message ([`message()`]), a mail
//!    of a day ([`email()`]). The key is made of the name, so it survives a crash
//!    of whoever tries, and nothing has to be stored.
//! 2. **It has none, but there is a moment at which it is decided on**: a form is
//!    shown, a button appears. [`mint()`] a key there, store it with the form,
//!    and send it with each try. Two forms are two operations, even if they are equal.
//! 3. **Neither**: all that tells a double click from a new operation is time.
//!    [`form()`] and [`compound()`] make keys of a [`Window`] of time. This is a
//!    guess, for what may be done once too often or too seldom: not for money.
//!
//! # The edge of a window
//!
//! Two tries in one window have one key. Two tries a second apart, one before
//! the edge and one behind it, have two, so a single key of a window does not
//! make anything happen once. What does is [`Windowed::candidates`]: the keys of
//! the window before and of the current one. Whoever claims **both**, in one
//! transaction and in that order, collides with every other try that came up to
//! one length of the window earlier or later, since the two have a key in
//! common. Merely to look the previous key up and then to claim the current one
//! is enough only if no two tries run at the same time.
//!
//! A charge here has one `Idempotency-Key`, and so cannot claim two: take
//! [`payment()`] or [`mint()`] for it.
//!
//! # What a key looks like
//!
//! `payment:order_1:5000:v2`: the kind, then each field behind a colon. Within a
//! field `:`, `%`, `"`, `\` and all that is not visible ASCII is written as `%`
//! and two hex digits for each byte of its UTF-8. So no two operations have one key,
//! of one kind or of two, and a key in an `Idempotency-Key` header reads the
//! same with quotes and without. What would be longer than [`KEY_MAX`] becomes
//! `payment-sha256:` and the SHA-256 of the long form in hex; no kind is called
//! so, so this is never a readable key.
//!
//! Fields are taken as they are: nothing is trimmed, lower-cased or normalised,
//! and an empty one is a [`KeyError`]. Keys are logged by all who handle them, so
//! no field should be a person's name, address or card; [`email()`] hashes the
//! one that has to be.
//!
//! The forms above are promises: a release that made other keys of the same
//! fields would charge the retries of its predecessor again.

use std::{fmt, time::Duration};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value, error::Category};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    idempotency::{KEY_MAX, Key},
    money::Amount,
};

/// Why no key can be made. What was given is not repeated: it may be personal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Without it, the key would name more than one operation.
    #[error("the {0} is empty, and a key needs it")]
    Empty(&'static str),
    /// See [`Window::of`].
    #[error("a window has to be whole seconds long, from 1 second to 366 days")]
    WindowLength,
    /// Milliseconds given as seconds, most likely.
    #[error("a window has to lie in the years 1970 to 9999")]
    WindowTime,
    /// The text is not JSON.
    #[error("the data is not valid JSON (line {line}, column {column})")]
    NotJson {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// Which of the two is meant is anybody's guess.
    #[error("the data has a field twice in one object (line {line}, column {column})")]
    RepeatedField {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// JSON's numbers are doubles, and from there on two integers are one double.
    #[error(
        "the data has a number beyond ±9007199254740991, where neighbours become equal; write it as a text"
    )]
    LargeNumber,
}

/// For a payment: once per order, amount and version.
///
/// A retry has the version of the first try. A changed cart is a new version,
/// and so is a changed currency, and another card after a decline: the decline
/// is the outcome of the version before, and stays it.
///
/// `payment:order_1:5000:v2`
///
/// # Errors
/// If the order is empty.
pub fn payment(order: &str, amount: Amount, version: u32) -> Result<Key, KeyError> {
    Ok(KeyBuilder::new("payment")
        .field("order", order)?
        .plain(amount.minor_units())
        .plain(format_args!("v{version}"))
        .key())
}

/// For a form without a key of its own: once per user, form and window; mind
/// [the edge](self#the-edge-of-a-window).
///
/// The user is an id, not an address: it stands in the key.
///
/// `form:user_7:signup:20260701T120000Z:600s`
///
/// # Errors
/// If the user or the form is empty.
pub fn form(user: &str, form: &str, window: Window) -> Result<Windowed, KeyError> {
    let key = KeyBuilder::new("form")
        .field("user", user)?
        .field("form", form)?;
    Ok(Windowed::new(window, |window| {
        key.clone().window(window).key()
    }))
}

/// For an event that was delivered: once per source and event, however often
/// the source delivers it. Two sources may use the same id.
///
/// `webhook:stripe:evt_1`
///
/// # Errors
/// If the source or the event's id is empty.
pub fn webhook(source: &str, event: &str) -> Result<Key, KeyError> {
    Ok(KeyBuilder::new("webhook")
        .field("source", source)?
        .field("event", event)?
        .key())
}

/// For a message of a queue: once per message. The id has to be the sender's; one
/// that the queue gives out anew with each delivery tells nothing.
///
/// `message:msg_1`
///
/// # Errors
/// If the id is empty.
pub fn message(id: &str) -> Result<Key, KeyError> {
    Ok(KeyBuilder::new("message").field("id", id)?.key())
}

/// For a mail: once per recipient, template and day.
///
/// An address is personal data, and keys get into the logs of others. So the key
/// carries the SHA-256 in hex of the recipient's length in bytes, a colon, and
/// the recipient (`15:ada@example.com`). That keeps the address out of sight, and
/// no more: whoever has a list of addresses can hash them all and compare.
///
/// `ada@example.com` and `Ada@example.com` are two recipients here, as some mail
/// servers have it. Which day it is, depends on the time zone; choose one.
///
/// `email:` hash `:welcome:2026-07-01`
///
/// # Errors
/// If the recipient or the template is empty.
pub fn email(recipient: &str, template: &str, day: NaiveDate) -> Result<Key, KeyError> {
    if recipient.is_empty() {
        return Err(KeyError::Empty("recipient"));
    }
    let pseudonym = Sha256::digest(format!("{}:{recipient}", recipient.len()));
    Ok(KeyBuilder::new("email")
        .plain(Hex(&pseudonym))
        .field("template", template)?
        .plain(day)
        .key())
}

/// For what has no shorter name: once per entity, action, data and window; mind
/// [the edge](self#the-edge-of-a-window).
///
/// `compound:cart_3:checkout:20260701T120000Z:3600s:` and [`Data`]'s hash
///
/// # Errors
/// If the entity or the action is empty.
pub fn compound(
    entity: &str,
    action: &str,
    window: Window,
    data: &Data,
) -> Result<Windowed, KeyError> {
    let key = KeyBuilder::new("compound")
        .field("entity", entity)?
        .field("action", action)?;
    Ok(Windowed::new(window, |window| {
        key.clone().window(window).plain(Hex(&data.0)).key()
    }))
}

/// A key that names nothing yet, for the moment at which an operation is first
/// described. It has to be stored before the first try: minted anew at each try,
/// it protects from nothing.
///
/// A UUIDv7, which has no colon and so is no key of the other kinds.
#[must_use]
pub fn mint() -> Key {
    valid(Uuid::now_v7().to_string())
}

/// A span of time, aligned to the Unix epoch, so that all who cut time into the
/// same length agree on where the cuts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    start: DateTime<Utc>,
    length: TimeDelta,
}

/// The longest window; more is a slip.
const WINDOW_MAX: Duration = Duration::from_hours(366 * 24);

impl Window {
    /// The window of this length that `at` lies in. A window's start belongs to
    /// it, its end to the next.
    ///
    /// # Errors
    /// If the length is not in whole seconds, zero, or more than 366 days; or
    /// `at` is not in the years 1970 to 9999.
    pub fn of(length: Duration, at: DateTime<Utc>) -> Result<Self, KeyError> {
        if length.is_zero() || length.subsec_nanos() != 0 || length > WINDOW_MAX {
            return Err(KeyError::WindowLength);
        }
        let length = TimeDelta::from_std(length).map_err(|_| KeyError::WindowLength)?;
        let second = at.timestamp();
        let start = DateTime::from_timestamp(second - second.rem_euclid(length.num_seconds()), 0)
            .filter(|_| (0..YEAR_10000).contains(&second))
            .ok_or(KeyError::WindowTime)?;
        Ok(Self { start, length })
    }

    /// The window before it, which ends where this one starts.
    ///
    /// The first window that a date can name, some 262,000 years back, has none
    /// before it, and gives itself.
    #[must_use]
    pub fn previous(self) -> Self {
        self.start
            .checked_sub_signed(self.length)
            .map_or(self, |start| Self { start, ..self })
    }

    /// Its first moment.
    #[must_use]
    pub fn start(self) -> DateTime<Utc> {
        self.start
    }
}

/// 10000-01-01T00:00:00Z.
const YEAR_10000: i64 = 253_402_300_800;

/// The keys of one operation in the current window and in the one before. A single
/// one of them is not enough: see [the edge](self#the-edge-of-a-window).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windowed {
    previous: Key,
    current: Key,
}

impl Windowed {
    fn new(window: Window, key: impl Fn(Window) -> Key) -> Self {
        Self {
            previous: key(window.previous()),
            current: key(window),
        }
    }

    /// Both keys in the order in which they are to be claimed: the previous
    /// window's, then the current one's. The order is that of time, so that two
    /// tries that claim both never wait for each other.
    #[must_use]
    pub fn candidates(&self) -> [&Key; 2] {
        [&self.previous, &self.current]
    }

    /// The current window's key.
    #[must_use]
    pub fn current(&self) -> &Key {
        &self.current
    }

    /// The previous window's key.
    #[must_use]
    pub fn previous(&self) -> &Key {
        &self.previous
    }
}

/// What an operation is about, as the SHA-256 of its canonical JSON (RFC 8785):
/// the order of fields and white space make no difference, that of a list does.
///
/// JSON's numbers are doubles: `1` and `1.0` are one, and so are two numbers that
/// differ in the eighteenth digit only. Write amounts in minor units, or as texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Data([u8; 32]);

impl Data {
    /// From JSON that is at hand as a value.
    ///
    /// # Errors
    /// If a number lies beyond ±9007199254740991.
    ///
    /// # Panics
    /// Never: every [`Value`] has a canonical form.
    pub fn new(value: &Value) -> Result<Self, KeyError> {
        if !numbers_are_exact(value) {
            return Err(KeyError::LargeNumber);
        }
        let canonical = serde_json_canonicalizer::to_vec(value)
            .expect("a JSON value has no NaN and no keys but texts");
        Ok(Self(Sha256::digest(canonical).into()))
    }

    /// From JSON as a text.
    ///
    /// # Errors
    /// If it is not JSON, has a field twice, or a number beyond ±9007199254740991.
    pub fn from_json(text: &str) -> Result<Self, KeyError> {
        let Unrepeated(value) = serde_json::from_str(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            // Only `Unrepeated` finds fault with what is JSON.
            match error.classify() {
                Category::Data => KeyError::RepeatedField { line, column },
                _ => KeyError::NotJson { line, column },
            }
        })?;
        Self::new(&value)
    }
}

fn numbers_are_exact(value: &Value) -> bool {
    const EXACT_MAX: f64 = 9_007_199_254_740_991.0;
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|n| n.abs() <= EXACT_MAX),
        Value::Array(items) => items.iter().all(numbers_are_exact),
        Value::Object(fields) => fields.values().all(numbers_are_exact),
        Value::Null | Value::Bool(_) | Value::String(_) => true,
    }
}

/// JSON in which no object has a field twice; [`Value`] lets the last one win,
/// and two operations would have one key.
struct Unrepeated(Value);

impl<'de> Deserialize<'de> for Unrepeated {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UnrepeatedVisitor).map(Self)
    }
}

struct UnrepeatedVisitor;

impl<'de> Visitor<'de> for UnrepeatedVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("not a number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unrepeated(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some((name, Unrepeated(value))) = entries.next_entry::<String, _>()? {
            if fields.insert(name, value).is_some() {
                return Err(A::Error::custom("a field twice"));
            }
        }
        Ok(Value::Object(fields))
    }
}

/// What would end a field, begin an escape, or change in a quoted header; all
/// beyond ASCII is escaped in any case.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%').add(b':').add(b'\\');

/// The readable form while it grows. Each kind has a fixed number of fields.
#[derive(Clone)]
struct KeyBuilder {
    kind: &'static str,
    readable: String,
}

impl KeyBuilder {
    fn new(kind: &'static str) -> Self {
        Self {
            kind,
            readable: kind.to_owned(),
        }
    }

    fn field(self, name: &'static str, text: &str) -> Result<Self, KeyError> {
        if text.is_empty() {
            return Err(KeyError::Empty(name));
        }
        Ok(self.plain(utf8_percent_encode(text, ESCAPED)))
    }

    /// What is neither empty nor ever has a colon in it.
    fn plain(mut self, value: impl fmt::Display) -> Self {
        self.readable = format!("{}:{value}", self.readable);
        self
    }

    fn window(self, window: Window) -> Self {
        self.plain(window.start.format("%Y%m%dT%H%M%SZ"))
            .plain(format_args!("{}s", window.length.num_seconds()))
    }

    fn key(self) -> Key {
        if self.readable.len() <= KEY_MAX {
            return valid(self.readable);
        }
        let hash = Sha256::digest(&self.readable);
        valid(format!("{}-sha256:{}", self.kind, Hex(&hash)))
    }
}

fn valid(text: String) -> Key {
    Key::from_text(text).expect("what is written here is visible ASCII, and short")
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use serde_json::json;
    use std::collections::HashMap;

    fn amount(minor_units: i64) -> Amount {
        Amount::new(minor_units).unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn minutes(count: u64, time: &str) -> Window {
        Window::of(Duration::from_mins(count), at(time)).unwrap()
    }

    fn day() -> NaiveDate {
        "2026-07-01".parse().unwrap()
    }

    /// Clients of another release build these too: a change here makes new
    /// charges of their retries. The hashes were computed by another program.
    #[test]
    fn a_key_stays_what_it_is() {
        let noon = minutes(10, "2026-07-01T12:07:31Z");
        let data = Data::from_json(r#"{"b": [1, 2.50], "a": "ü"}"#).unwrap();
        let in_form = form("user_7", "signup", noon).unwrap();
        let in_compound = compound("cart_3", "checkout", noon, &data).unwrap();
        for (key, expected) in [
            (
                &payment("order_1", amount(5000), 2).unwrap(),
                "payment:order_1:5000:v2",
            ),
            (
                &payment("Ü 1:2%\"\\", amount(1), 0).unwrap(),
                "payment:%C3%9C%201%3A2%25%22%5C:1:v0",
            ),
            (
                in_form.current(),
                "form:user_7:signup:20260701T120000Z:600s",
            ),
            (
                in_form.previous(),
                "form:user_7:signup:20260701T115000Z:600s",
            ),
            (&webhook("stripe", "evt_1").unwrap(), "webhook:stripe:evt_1"),
            (&message("msg_1").unwrap(), "message:msg_1"),
            (
                &email("ada@example.com", "welcome", day()).unwrap(),
                "email:ce9ea766e9dd4bb53d85eec2130f4ec51df8665ffc0de62f7ad64c0c7f106743:welcome:2026-07-01",
            ),
            (
                in_compound.current(),
                "compound:cart_3:checkout:20260701T120000Z:600s:75151e181452ee19f62c437a12e96bbbe4453c199f041abfe6b18ab3cb8f3c4f",
            ),
            (
                &message(&"m".repeat(248)).unwrap(),
                "message-sha256:02ee11356703c0a826e3be903645c390c33df19949eaef8cc436934ffbfae41d",
            ),
        ] {
            assert_eq!(key.as_str(), expected);
        }
        assert_eq!(message(&"m".repeat(247)).unwrap().as_str().len(), KEY_MAX);
    }

    #[test]
    fn an_empty_field_is_named() {
        let window = minutes(1, "2026-07-01T12:00:00Z");
        let data = Data::new(&json!({})).unwrap();
        for (result, name) in [
            (payment("", amount(1), 1).map(drop), "order"),
            (form("", "f", window).map(drop), "user"),
            (form("u", "", window).map(drop), "form"),
            (webhook("", "e").map(drop), "source"),
            (webhook("s", "").map(drop), "event"),
            (message("").map(drop), "id"),
            (email("", "t", day()).map(drop), "recipient"),
            (email("r", "", day()).map(drop), "template"),
            (compound("", "a", window, &data).map(drop), "entity"),
            (compound("e", "", window, &data).map(drop), "action"),
        ] {
            assert_eq!(result, Err(KeyError::Empty(name)));
        }
    }

    #[test]
    fn nothing_is_trimmed_or_folded() {
        let keys = ["m", " m", "m ", "m\n", "m\0", "M", "é", "e\u{301}"].map(message);
        for (i, key) in keys.iter().enumerate() {
            assert!(key.is_ok() && !keys[..i].contains(key), "{i}");
        }
    }

    #[test]
    fn a_recipient_is_not_in_the_key() {
        for recipient in ["ada@example.com", &"ada".repeat(100)] {
            let key = email(recipient, "welcome", day()).unwrap();
            assert!(!key.as_str().contains("ada"));
            assert!(key.as_str().ends_with(":welcome:2026-07-01"));
        }
    }

    #[test]
    fn the_hash_of_a_long_form_is_no_readable_key() {
        let long = message(&"m".repeat(300)).unwrap();
        let (kind, hash) = long.as_str().split_once(':').unwrap();
        assert_eq!(kind, "message-sha256");
        for field in [hash, long.as_str(), &format!("sha256:{hash}")] {
            assert_ne!(message(field).unwrap(), long);
        }
    }

    #[test]
    fn a_window_has_an_edge_and_its_candidates_bridge_it() {
        let keys = |time| form("u", "f", minutes(10, time)).unwrap();
        let (before, behind) = (
            keys("2026-07-01T12:09:59.999999999Z"),
            keys("2026-07-01T12:10:00Z"),
        );
        assert_eq!(keys("2026-07-01T12:00:00Z"), before);
        assert_eq!(keys("2026-07-01T12:19:59Z"), behind);
        assert_ne!(before.current(), behind.current());
        assert_eq!(before.current(), behind.previous());
        assert_eq!(
            behind.candidates(),
            [before.current(), behind.current()],
            "the earlier one first"
        );
    }

    #[test]
    fn windows_of_two_lengths_have_two_keys() {
        let time = "2026-07-01T00:00:00Z";
        let (short, long) = (minutes(10, time), minutes(20, time));
        assert_eq!(short.start(), long.start());
        let current = |window| form("u", "f", window).unwrap().current;
        assert_ne!(current(short), current(long));
    }

    #[test]
    fn a_window_is_cut_from_the_epoch() {
        let week = Duration::from_hours(7 * 24);
        let window = Window::of(week, at("2026-07-01T12:00:00Z")).unwrap();
        // 1970-01-01 was a Thursday.
        assert_eq!(window.start(), at("2026-06-25T00:00:00Z"));
        let first = Window::of(week, at("1970-01-01T00:00:00Z")).unwrap();
        assert_eq!(first.start(), at("1970-01-01T00:00:00Z"));
        assert_eq!(first.previous().start(), at("1969-12-25T00:00:00Z"));
        let mut window = Window::of(WINDOW_MAX, at("9999-12-31T23:59:59Z")).unwrap();
        for _ in 0..300_000 {
            window = window.previous();
        }
        assert_eq!(window.previous(), window);
    }

    #[test]
    fn a_window_that_cannot_be_meant_is_refused() {
        let now = at("2026-07-01T12:00:00Z");
        for length in [
            Duration::ZERO,
            Duration::from_millis(999),
            Duration::from_millis(1500),
            WINDOW_MAX + Duration::from_secs(1),
            Duration::MAX,
        ] {
            assert_eq!(Window::of(length, now), Err(KeyError::WindowLength));
        }
        assert!(Window::of(WINDOW_MAX, now).is_ok());
        let second = Duration::from_secs(1);
        for time in [
            at("1969-12-31T23:59:59Z"),
            at("+10000-01-01T00:00:00Z"),
            DateTime::from_timestamp_millis(now.timestamp_millis() * 1000).unwrap(),
            DateTime::<Utc>::MIN_UTC,
            DateTime::<Utc>::MAX_UTC,
        ] {
            assert_eq!(Window::of(second, time), Err(KeyError::WindowTime));
        }
        assert!(Window::of(second, at("9999-12-31T23:59:59Z")).is_ok());
    }

    #[test]
    fn data_is_what_it_means_and_not_how_it_is_written() {
        let data = |text| Data::from_json(text).unwrap();
        let one = data(r#"{"a":1,"b":{"x":"1","y":[true,null]}}"#);
        assert_eq!(
            one,
            data(" { \"b\" : {\"y\":[true,null], \"x\":\"\\u0031\"}, \"a\": 1.0 }\n")
        );
        assert_eq!(
            one,
            Data::new(&json!({"a": 1, "b": {"x": "1", "y": [true, null]}})).unwrap()
        );
        for other in [
            r#"{"a":"1","b":{"x":"1","y":[true,null]}}"#,
            r#"{"a":1,"b":{"x":"1","y":[null,true]}}"#,
            r#"{"a":1,"b":{"x":"1","y":[true]}}"#,
            r#"{"a":1,"b":{"x":"1"},"y":[true,null]}"#,
        ] {
            assert_ne!(one, data(other), "{other}");
        }
    }

    #[test]
    fn data_that_would_be_taken_for_other_data_is_refused() {
        for text in [
            "9007199254740992",
            "-9007199254740993.0",
            r#"{"a": [18446744073709551617]}"#,
            "1e300",
        ] {
            assert_eq!(Data::from_json(text), Err(KeyError::LargeNumber), "{text}");
        }
        assert!(Data::from_json("[9007199254740991, -9007199254740991]").is_ok());
        assert!(matches!(
            Data::from_json("[\n{\"a\": 1, \"\\u0061\": 2}]"),
            Err(KeyError::RepeatedField { line: 2, .. })
        ));
        assert!(Data::from_json(r#"[{"a": 1}, {"a": {"a": 2}}]"#).is_ok());
        for text in ["", "{", "{} {}", "NaN", "1e999", "'a'", &"[".repeat(10_000)] {
            assert!(
                matches!(Data::from_json(text), Err(KeyError::NotJson { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn a_minted_key_is_new_each_time() {
        let keys: Vec<_> = (0..1000).map(|_| mint()).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
        assert!(!keys[0].as_str().contains(':'));
    }

    /// What each builder was given.
    #[derive(Debug, Clone, PartialEq)]
    enum Given {
        Payment(String, i64, u32),
        Form(String, String, Window),
        Webhook(String, String),
        Message(String),
        Email(String, String, NaiveDate),
        Compound(String, String, Window, String),
    }

    impl Given {
        fn key(&self) -> Key {
            match self {
                Self::Payment(order, units, version) => payment(order, amount(*units), *version),
                Self::Form(user, name, window) => form(user, name, *window).map(|it| it.current),
                Self::Webhook(source, event) => webhook(source, event),
                Self::Message(id) => message(id),
                Self::Email(recipient, template, day) => email(recipient, template, *day),
                Self::Compound(entity, action, window, data) => {
                    let data = Data::new(&json!(data)).unwrap();
                    compound(entity, action, *window, &data).map(|it| it.current)
                }
            }
            .unwrap()
        }
    }

    /// Mostly such texts as would run together if a guard were missing: few
    /// letters, so that many a pair is nearly equal, and some too long to be read.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "[a:]{1,3}",
            2 => "(%|3|A|:|%3A|%25){1,2}",
            1 => "[1v:]{1,4}",
            2 => "[a:]{1,2}".prop_map(|text| text + &"x".repeat(250)),
            1 => "[ü \u{0}\n\"\\\\/=\u{1F600}]{1,2}",
            1 => any::<String>().prop_filter("an error of its own", |text| !text.is_empty()),
        ]
    }

    fn window() -> impl Strategy<Value = Window> {
        (
            prop_oneof![1..3u64, 1..31_622_400u64],
            prop_oneof![0..5i64, 0..YEAR_10000],
        )
            .prop_map(|(length, second)| {
                let at = DateTime::from_timestamp(second, 0).unwrap();
                Window::of(Duration::from_secs(length), at).unwrap()
            })
    }

    fn given() -> impl Strategy<Value = Given> {
        let units = prop_oneof![1..3i64, 1..=crate::money::AMOUNT_MAX];
        let version = prop_oneof![0..3u32, any::<u32>()];
        let day = (0..3i32, 1..366u32)
            .prop_map(|(year, day)| NaiveDate::from_yo_opt(2026 + year, day).unwrap());
        prop_oneof![
            (text(), units, version).prop_map(|(a, b, c)| Given::Payment(a, b, c)),
            (text(), text(), window()).prop_map(|(a, b, c)| Given::Form(a, b, c)),
            (text(), text()).prop_map(|(a, b)| Given::Webhook(a, b)),
            text().prop_map(Given::Message),
            (text(), text(), day).prop_map(|(a, b, c)| Given::Email(a, b, c)),
            (text(), text(), window(), text()).prop_map(|(a, b, c, d)| Given::Compound(a, b, c, d)),
        ]
    }

    proptest! {
        #[test]
        fn two_operations_have_two_keys_and_one_has_one(all in vec(given(), 20..40)) {
            let mut seen: HashMap<String, Given> = HashMap::new();
            for given in all {
                let key = given.key();
                prop_assert_eq!(&key, &given.key());
                if let Some(other) = seen.insert(key.as_str().to_owned(), given.clone()) {
                    prop_assert_eq!(other, given);
                }
            }
        }

        #[test]
        fn a_field_does_not_reach_into_its_neighbour(
            a in text(), b in text(), c in text(), colon in "(:|%3A|%253A)", window in window(),
        ) {
            let (early, late) = (format!("{a}{colon}{b}"), format!("{b}{colon}{c}"));
            let data = Data::new(&json!(null)).unwrap();
            prop_assert_ne!(webhook(&early, &c), webhook(&a, &late));
            prop_assert_ne!(form(&early, &c, window), form(&a, &late, window));
            prop_assert_ne!(
                compound(&early, &c, window, &data),
                compound(&a, &late, window, &data)
            );
            prop_assert_ne!(message(&format!("{a}{colon}{b}")), webhook(&a, &b));
        }

        #[test]
        fn every_key_is_one_for_the_header_too(given in given()) {
            for key in [given.key(), mint()] {
                prop_assert_eq!(Key::from_header(key.as_str().as_bytes()), Ok(key.clone()));
                let quoted = format!("\"{}\"", key.as_str());
                prop_assert_eq!(Key::from_header(quoted.as_bytes()), Ok(key));
            }
        }

        #[test]
        fn tries_up_to_a_length_apart_have_a_candidate_in_common(
            length in 1..100_000u64,
            second in 1_000_000..4_000_000_000i64,
            apart in 0.0..=1.0f64,
        ) {
            let keys = |second| {
                let at = DateTime::from_timestamp(second, 0).unwrap();
                let window = Window::of(Duration::from_secs(length), at).unwrap();
                assert!(window.start() <= at && at < window.start() + window.length);
                form("u", "f", window).unwrap()
            };
            #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
            let later = second + (length as f64 * apart) as i64;
            let (one, other) = (keys(second), keys(later));
            prop_assert!(one.candidates().iter().any(|key| other.candidates().contains(key)));
        }

        #[test]
        fn data_differs_if_it_is_different(
            a in proptest::collection::btree_map("[a-z]{1,3}", any::<Option<String>>(), 0..4),
            b in proptest::collection::btree_map("[a-z]{1,3}", any::<Option<String>>(), 0..4),
        ) {
            let shuffled: Vec<_> = a
                .iter()
                .rev()
                .map(|(name, value)| format!("{}:{}", json!(name), json!(value)))
                .collect();
            let of_a = Data::new(&json!(a)).unwrap();
            prop_assert_eq!(Data::from_json(&format!("{{{}}}", shuffled.join(","))), Ok(of_a));
            prop_assert_eq!(a == b, Data::new(&json!(b)) == Ok(of_a));
        }
    }
}
