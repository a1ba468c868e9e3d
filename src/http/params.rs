//! Parameters: a JSON object or a form becomes one tree of named values, and a
//! typed request takes from it what it knows. Whatever is left, repeated or of
//! the wrong type is refused by its name, in Stripe's bracket form.
//!
//! Not serde's derive: its errors do not say which parameter is meant, and a
//! map would swallow a repeated one. Not a form crate: those decode broken
//! UTF-8 to replacement characters and let the last of two values win.
//!
//! Parsing takes time and memory in proportion to the bytes, whatever they are,
//! and stops at [`VALUES_MAX`] values: it runs on a thread that all accounts
//! share.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fmt,
};

use percent_encoding::percent_decode;
use serde::{
    Deserializer,
    de::{DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

use crate::charges::METADATA_ENTRIES_MAX;
use crate::error::{BadParameter, ParameterCode};

/// Most values that a body or a query may hold, those inside of others counted
/// too. The largest request there is updates metadata: it removes 50 names and
/// adds 50.
pub const VALUES_MAX: usize = 200;

/// How deep values may be nested: `{"metadata": {"order": "7"}}` is two levels.
/// A few more than are used, so that what is nested by mistake gets the error of
/// its parameter.
pub const DEPTH_MAX: usize = 8;

/// How a value was written, and so what it may mean: a form knows texts only,
/// and `5000` in it is a number where one is asked for; JSON's `"5000"` is not.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    Text(String),
    FormText(String),
    List,
    Map(Vec<(String, Value)>),
}

/// What a request gave, by name, as far as nobody took it yet.
#[derive(Debug)]
pub struct Params(Vec<(String, Value)>);

/// A parameter that may have parameters inside.
#[derive(Debug)]
pub enum Nested {
    /// It has them, by their names in brackets.
    Map(Params),
    /// It is a value itself.
    Value(Params),
}

fn bad(code: ParameterCode, param: &str, message: String) -> BadParameter {
    BadParameter {
        code,
        param: Some(param.to_owned()),
        message,
    }
}

fn unreadable(message: impl Into<String>) -> BadParameter {
    BadParameter {
        code: ParameterCode::Unreadable,
        param: None,
        message: message.into(),
    }
}

fn too_many_values() -> BadParameter {
    unreadable(format!(
        "The request has more than {VALUES_MAX} parameters, counting those inside of others."
    ))
}

impl Params {
    /// From a JSON object.
    ///
    /// # Errors
    /// If it is not one, holds more than [`VALUES_MAX`] values or nests them
    /// deeper than [`DEPTH_MAX`], or a name stands in it twice.
    pub fn from_json(body: &[u8]) -> Result<Self, BadParameter> {
        let text = std::str::from_utf8(body).map_err(|_| unreadable("The body is not UTF-8."))?;
        let limits = Limits::default();
        let mut json = serde_json::Deserializer::from_str(text);
        let value = limits
            .at_depth(0)
            .deserialize(&mut json)
            .and_then(|value| json.end().map(|()| value))
            .map_err(|error| match limits.exceeded.get() {
                Some(Exceeded::Values) => too_many_values(),
                Some(Exceeded::Depth) => unreadable(format!(
                    "The body is nested deeper than {DEPTH_MAX} levels."
                )),
                // Only where, never what: the message could repeat the body.
                None => unreadable(format!(
                    "The body is not valid JSON (line {}, column {}).",
                    error.line(),
                    error.column()
                )),
            })?;
        match value {
            Value::Map(fields) => Self(fields).without_repetition(),
            _ => Err(unreadable("The body is JSON, but not an object.")),
        }
    }

    /// From `application/x-www-form-urlencoded`, or a query.
    ///
    /// # Errors
    /// If it is not UTF-8, holds more than [`VALUES_MAX`] values, a name has
    /// brackets of another form than `a[b]`, or stands in it twice.
    pub fn from_form(body: &[u8]) -> Result<Self, BadParameter> {
        let mut fields: Vec<(String, Value)> = Vec::new();
        // Where in `fields` the map of an outer name is.
        let mut maps: HashMap<String, usize> = HashMap::new();
        let pairs = body.split(|&b| b == b'&').filter(|pair| !pair.is_empty());
        for (count, pair) in pairs.enumerate() {
            if count == VALUES_MAX {
                return Err(too_many_values());
            }
            let end = pair.iter().position(|&b| b == b'=').unwrap_or(pair.len());
            let name = form_text(&pair[..end])?;
            let value = Value::FormText(form_text(pair.get(end + 1..).unwrap_or_default())?);
            let Some((outer, inner)) = name.split_once('[') else {
                fields.push((name, value));
                continue;
            };
            let inner = inner
                .strip_suffix(']')
                .filter(|inner| !outer.is_empty() && !inner.contains(['[', ']']))
                .ok_or_else(|| {
                    bad(
                        ParameterCode::Unknown,
                        &printable(&name),
                        "There is no parameter of this name.".to_owned(),
                    )
                })?;
            let entry = (inner.to_owned(), value);
            let map = maps.get(outer).map(|&at| &mut fields[at].1);
            if let Some(Value::Map(entries)) = map {
                entries.push(entry);
            } else {
                maps.insert(outer.to_owned(), fields.len());
                fields.push((outer.to_owned(), Value::Map(vec![entry])));
            }
        }
        Self(fields).without_repetition()
    }

    fn without_repetition(self) -> Result<Self, BadParameter> {
        refuse_repetition(&self.0, None)?;
        Ok(self)
    }

    /// The value of `name`; JSON's null is the same as nothing.
    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(field, _)| field == name)?;
        Some(self.0.swap_remove(at).1).filter(|value| *value != Value::Null)
    }

    /// An integer from `min` to `max`.
    ///
    /// # Errors
    /// If it is there and is none.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, BadParameter> {
        let number = match self.take(name) {
            None => return Ok(None),
            Some(Value::FormText(text)) if text.is_empty() => return Err(empty(name)),
            Some(Value::Number(number)) => number.as_i64(),
            Some(Value::FormText(text)) => form_integer(&text),
            Some(_) => None,
        };
        number
            .filter(|number| (min..=max).contains(number))
            .map(Some)
            .ok_or_else(|| {
                bad(
                    ParameterCode::InvalidInteger,
                    name,
                    format!("{name} must be an integer from {min} to {max}."),
                )
            })
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// If it is there and is neither.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, BadParameter> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::FormText(text)) if text == "true" => Ok(Some(true)),
            Some(Value::FormText(text)) if text == "false" => Ok(Some(false)),
            Some(Value::FormText(text)) if text.is_empty() => Err(empty(name)),
            Some(_) => Err(bad(
                ParameterCode::Invalid,
                name,
                format!("{name} must be true or false."),
            )),
        }
    }

    /// A text of 1 to `max` characters, without NUL.
    ///
    /// # Errors
    /// If it is there and is none.
    pub fn text(&mut self, name: &str, max: usize) -> Result<Option<String>, BadParameter> {
        self.take(name)
            .map(|value| {
                let text = text(name, value, max)?;
                if text.is_empty() {
                    Err(empty(name))
                } else {
                    Ok(text)
                }
            })
            .transpose()
    }

    /// The same, or an empty one, which says that there is to be none.
    ///
    /// # Errors
    /// If it is there and is none.
    pub fn text_or_none(&mut self, name: &str, max: usize) -> Result<Option<String>, BadParameter> {
        let value = self.take(name);
        value.map(|value| text(name, value, max)).transpose()
    }

    /// Stripe's metadata: at most 50 names of up to 40 characters without
    /// brackets, each with a text of up to 500. An empty text is how Stripe's
    /// clients say "not there", and so is an empty text for the whole.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn metadata(&mut self, name: &str) -> Result<BTreeMap<String, String>, BadParameter> {
        let (mut metadata, _) = self.metadata_update(name)?;
        metadata.retain(|_, text| !text.is_empty());
        Ok(metadata)
    }

    /// Metadata that changes what there is: names with their new texts, empty
    /// where the name is to go; and whether all that there was is to go.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata).
    pub fn metadata_update(
        &mut self,
        name: &str,
    ) -> Result<(BTreeMap<String, String>, bool), BadParameter> {
        let entries = match self.take(name) {
            None => return Ok((BTreeMap::new(), false)),
            Some(Value::Text(text) | Value::FormText(text)) if text.is_empty() => {
                return Ok((BTreeMap::new(), true));
            }
            Some(Value::Map(entries)) => entries,
            Some(_) => {
                return Err(bad(
                    ParameterCode::Invalid,
                    name,
                    format!("{name} must be a set of names with texts."),
                ));
            }
        };
        let mut metadata = BTreeMap::new();
        for (key, value) in entries {
            let param = format!("{name}[{}]", printable(&key));
            let well_formed = !key.is_empty()
                && key.chars().count() <= METADATA_KEY_MAX
                && !key.contains(['[', ']', '\0']);
            if !well_formed {
                return Err(bad(
                    ParameterCode::Invalid,
                    &param,
                    format!(
                        "A name in {name} has 1 to {METADATA_KEY_MAX} characters, without brackets and NUL."
                    ),
                ));
            }
            let text = match value {
                Value::Null => String::new(),
                value => text(&param, value, METADATA_VALUE_MAX)?,
            };
            metadata.insert(key, text);
        }
        if metadata.values().filter(|text| !text.is_empty()).count() > METADATA_ENTRIES_MAX {
            return Err(bad(
                ParameterCode::Invalid,
                name,
                format!("{name} may hold {METADATA_ENTRIES_MAX} names at most."),
            ));
        }
        Ok((metadata, false))
    }

    /// What is inside of `name`: its brackets `name[…]`, or its JSON object, as
    /// parameters of their own; or its text, where it is one.
    ///
    /// # Errors
    /// If it is there and is neither.
    pub fn nested(&mut self, name: &str) -> Result<Option<Nested>, BadParameter> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Map(entries)) => {
                let named = entries
                    .into_iter()
                    .map(|(inner, value)| (format!("{name}[{inner}]"), value))
                    .collect();
                Ok(Some(Nested::Map(Self(named))))
            }
            Some(value) => Ok(Some(Nested::Value(Self(vec![(name.to_owned(), value)])))),
        }
    }

    /// Refuses what nobody took.
    ///
    /// # Errors
    /// If anything is left.
    pub fn finish(self) -> Result<(), BadParameter> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(bad(
                ParameterCode::Unknown,
                &printable(name),
                "There is no parameter of this name.".to_owned(),
            )),
        }
    }
}

pub(super) const METADATA_KEY_MAX: usize = 40;
pub(super) const METADATA_VALUE_MAX: usize = 500;

/// The error for a required parameter that is not there.
#[must_use]
pub fn missing(name: &str) -> BadParameter {
    bad(ParameterCode::Missing, name, format!("{name} is required."))
}

/// The error for a value that is not among those allowed.
#[must_use]
pub fn not_allowed(name: &str, message: &str) -> BadParameter {
    bad(ParameterCode::Invalid, name, format!("{name} {message}"))
}

fn empty(name: &str) -> BadParameter {
    bad(
        ParameterCode::InvalidEmpty,
        name,
        format!("{name} is empty; leave it out if there is no value."),
    )
}

fn text(name: &str, value: Value, max: usize) -> Result<String, BadParameter> {
    let (Value::Text(text) | Value::FormText(text)) = value else {
        return Err(bad(
            ParameterCode::Invalid,
            name,
            format!("{name} must be a text."),
        ));
    };
    if text.contains('\0') {
        return Err(bad(
            ParameterCode::Invalid,
            name,
            format!("{name} may not contain NUL."),
        ));
    }
    if text.chars().count() > max {
        return Err(bad(
            ParameterCode::Invalid,
            name,
            format!("{name} is longer than {max} characters."),
        ));
    }
    Ok(text)
}

/// A form's integer has one spelling: no sign but `-`, no leading zeros, no spaces.
fn form_integer(text: &str) -> Option<i64> {
    let number: i64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn form_text(encoded: &[u8]) -> Result<String, BadParameter> {
    let spaced: Cow<'_, [u8]> = if encoded.contains(&b'+') {
        encoded
            .iter()
            .map(|&b| if b == b'+' { b' ' } else { b })
            .collect()
    } else {
        encoded.into()
    };
    percent_decode(&spaced)
        .decode_utf8()
        .map(Cow::into_owned)
        .map_err(|_| unreadable("The form is not UTF-8."))
}

fn refuse_repetition(fields: &[(String, Value)], outer: Option<&str>) -> Result<(), BadParameter> {
    let mut names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let name = printable(pair[0]);
        let param = outer.map_or_else(|| name.clone(), |outer| format!("{outer}[{name}]"));
        return Err(bad(
            ParameterCode::Repeated,
            &param,
            format!("{param} was sent more than once."),
        ));
    }
    for (name, value) in fields {
        if let (None, Value::Map(inner)) = (outer, value) {
            refuse_repetition(inner, Some(&printable(name)))?;
        }
    }
    Ok(())
}

/// A name as a client sent it, fit for a message: short and without controls.
fn printable(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Which limit a JSON text went beyond.
#[derive(Clone, Copy)]
enum Exceeded {
    Values,
    Depth,
}

/// What may still be read of a JSON text.
struct Limits {
    values_left: Cell<usize>,
    exceeded: Cell<Option<Exceeded>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // And the body itself.
            values_left: Cell::new(VALUES_MAX + 1),
            exceeded: Cell::new(None),
        }
    }
}

impl Limits {
    fn at_depth(&self, depth: usize) -> Tree<'_> {
        Tree {
            limits: self,
            depth,
        }
    }

    fn exceed<E: serde::de::Error>(&self, limit: Exceeded) -> E {
        self.exceeded.set(Some(limit));
        // Not seen by anybody: `exceeded` says it.
        E::custom("a limit is exceeded")
    }
}

/// Reads one value, which stands inside of `depth` others.
#[derive(Clone, Copy)]
struct Tree<'a> {
    limits: &'a Limits,
    depth: usize,
}

impl Tree<'_> {
    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            return Err(self.limits.exceed(Exceeded::Depth));
        }
        Ok(self.limits.at_depth(self.depth + 1))
    }
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.limits.values_left.get();
        let left = left
            .checked_sub(1)
            .ok_or_else(|| self.limits.exceed(Exceeded::Values))?;
        self.limits.values_left.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
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

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inside = self.inside::<A::Error>()?;
        // No parameter is a list: read to the end, and forget it.
        while seq.next_element_seed(inside)?.is_some() {}
        Ok(Value::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let inside = self.inside::<A::Error>()?;
        let mut entries = Vec::new();
        while let Some(name) = map.next_key()? {
            entries.push((name, map.next_value_seed(inside)?));
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code_and_param<T: fmt::Debug>(
        result: Result<T, BadParameter>,
    ) -> (ParameterCode, Option<String>) {
        let bad = result.unwrap_err();
        (bad.code, bad.param)
    }

    #[test]
    fn a_form_and_json_give_the_same_metadata() {
        let mut form = Params::from_form(b"metadata[order]=7&metadata%5Bnote%5D=a+b%26c").unwrap();
        let mut json = Params::from_json(br#"{"metadata":{"note":"a b&c","order":"7"}}"#).unwrap();
        let metadata = form.metadata("metadata").unwrap();
        assert_eq!(metadata, json.metadata("metadata").unwrap());
        assert_eq!(metadata["note"], "a b&c");
    }

    #[test]
    fn an_integer_has_one_spelling() {
        let of_form = |text: &str| {
            Params::from_form(format!("n={text}").as_bytes())
                .unwrap()
                .integer("n", 1, 9999)
        };
        let of_json = |text: &str| {
            Params::from_json(format!("{{\"n\":{text}}}").as_bytes())
                .unwrap()
                .integer("n", 1, 9999)
        };
        assert_eq!(of_form("5000"), Ok(Some(5000)));
        assert_eq!(of_json("5000"), Ok(Some(5000)));
        assert_eq!(of_json("null"), Ok(None));
        for wrong in [
            "05000",
            "%2B5000",
            "5000.0",
            "5e3",
            "+5000",
            "0x10",
            "0",
            "-1",
            "10000",
            "9223372036854775808",
        ] {
            assert!(of_form(wrong).is_err(), "form {wrong}");
        }
        for wrong in [
            "\"5000\"",
            "5000.0",
            "5e3",
            "0",
            "-1",
            "10000",
            "9223372036854775808",
            "1e300",
            "true",
            "[1]",
            "{}",
        ] {
            assert!(of_json(wrong).is_err(), "JSON {wrong}");
        }
    }

    #[test]
    fn what_is_repeated_is_named() {
        for (body, param) in [
            (&b"a=1&a=1"[..], "a"),
            (b"m[x]=1&m[x]=2", "m[x]"),
            (b"m=1&m[x]=2", "m"),
        ] {
            let result = Params::from_form(body);
            assert_eq!(
                code_and_param(result),
                (ParameterCode::Repeated, Some(param.to_owned()))
            );
        }
        for (body, param) in [
            (&br#"{"a":1,"b":2,"a":null}"#[..], "a"),
            (br#"{"m":{"x":"1","x":"1"}}"#, "m[x]"),
        ] {
            let result = Params::from_json(body);
            assert_eq!(
                code_and_param(result),
                (ParameterCode::Repeated, Some(param.to_owned()))
            );
        }
    }

    #[test]
    fn what_goes_beyond_a_limit_is_refused_by_it_and_not_read_to_its_end() {
        let refused = |result: Result<Params, BadParameter>| {
            let bad = result.unwrap_err();
            assert_eq!((bad.code, bad.param), (ParameterCode::Unreadable, None));
            bad.message
        };
        let too_many = "The request has more than 200 parameters, counting those inside of others.";
        let too_deep = "The body is nested deeper than 8 levels.";
        // What follows is broken, and would be another error if it were read.
        let form = |name: fn(usize) -> String, count| {
            let fields: Vec<_> = (0..count).map(|i| name(i) + "=1").collect();
            fields.join("&")
        };
        for name in [
            |i| format!("a{i}"),
            |i| format!("a{i}[]"),
            |i| format!("a{i}[b]"),
            |i| format!("a[b{i}]"),
        ] as [fn(usize) -> String; 4]
        {
            let most = form(name, VALUES_MAX);
            if !most.contains("[]") {
                Params::from_form(most.as_bytes()).unwrap();
            }
            let more = form(name, VALUES_MAX + 1) + "&%ff";
            assert_eq!(refused(Params::from_form(more.as_bytes())), too_many);
        }
        let json = |count: usize, end: &str| {
            let fields: Vec<_> = (0..count).map(|i| format!("\"a{i}\":1")).collect();
            format!("{{{}{end}", fields.join(","))
        };
        Params::from_json(json(VALUES_MAX, "}").as_bytes()).unwrap();
        assert_eq!(
            refused(Params::from_json(json(VALUES_MAX + 1, ",").as_bytes())),
            too_many
        );
        let inner = format!("{{\"m\":{}}}", json(VALUES_MAX - 1, "}"));
        Params::from_json(inner.as_bytes()).unwrap();
        let inner = format!("{{\"m\":{},", json(VALUES_MAX, "}"));
        assert_eq!(refused(Params::from_json(inner.as_bytes())), too_many);
        let list = format!("{{\"m\":[{}1,", "1,".repeat(VALUES_MAX));
        assert_eq!(refused(Params::from_json(list.as_bytes())), too_many);

        for (open, close) in [("{\"a\":", "}"), ("[", "]")] {
            let body =
                |depth: usize, end: &str| format!("{{\"m\":{}1{end}", open.repeat(depth - 1));
            let most = body(DEPTH_MAX, &(close.repeat(DEPTH_MAX - 1) + "}"));
            Params::from_json(most.as_bytes()).unwrap();
            assert_eq!(
                refused(Params::from_json(body(DEPTH_MAX + 1, "").as_bytes())),
                too_deep
            );
        }
    }

    /// A form as the definition says it, one field after the other.
    fn naive(pairs: &[(String, Option<String>, String)]) -> Vec<(String, Value)> {
        let mut fields: Vec<(String, Value)> = Vec::new();
        for (outer, inner, text) in pairs {
            let value = Value::FormText(text.clone());
            let Some(inner) = inner else {
                fields.push((outer.clone(), value));
                continue;
            };
            let map = fields
                .iter_mut()
                .find(|(name, value)| name == outer && matches!(value, Value::Map(_)));
            if let Some((_, Value::Map(entries))) = map {
                entries.push((inner.clone(), value));
            } else {
                fields.push((outer.clone(), Value::Map(vec![(inner.clone(), value)])));
            }
        }
        fields
    }

    proptest! {
        #[test]
        fn a_form_is_what_its_fields_are_one_by_one(
            pairs in proptest::collection::vec(("[a-d]", proptest::option::of("[x-z]{1,2}"), "[0-9]{0,2}"), 0..8)
        ) {
            let fields: Vec<_> = pairs
                .iter()
                .map(|(outer, inner, text)| match inner {
                    Some(inner) => format!("{outer}[{inner}]={text}"),
                    None => format!("{outer}={text}"),
                })
                .collect();
            let expected = Params(naive(&pairs)).without_repetition();
            let parsed = Params::from_form(fields.join("&").as_bytes());
            prop_assert_eq!(parsed.map(|params| params.0), expected.map(|params| params.0));
        }

        #[test]
        fn a_request_has_at_most_so_many_values(count in 0..2 * VALUES_MAX, per_map in 1..60_usize) {
            let field = |i: usize| format!("a{}[b{i}]=1", i / per_map);
            let form: Vec<_> = (0..count).map(field).collect();
            let parsed = Params::from_form(form.join("&").as_bytes());
            prop_assert_eq!(parsed.is_ok(), count <= VALUES_MAX);
            let json: Vec<_> = (0..count).map(|i| format!("\"a{i}\":\"\"")).collect();
            let parsed = Params::from_json(format!("{{{}}}", json.join(",")).as_bytes());
            prop_assert_eq!(parsed.is_ok(), count <= VALUES_MAX);
        }

        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Params::from_json(&body);
            let _ = Params::from_form(&body);
        }

        #[test]
        fn any_text_survives_a_form(text in "\\PC{1,40}") {
            let body = format!("t={}", percent_encoding::utf8_percent_encode(&text, percent_encoding::NON_ALPHANUMERIC));
            let taken = Params::from_form(body.as_bytes()).unwrap().text("t", 40).unwrap();
            prop_assert_eq!(taken, Some(text));
        }
    }
}
