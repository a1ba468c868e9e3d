//! What of a request's body its fingerprint is taken of.

use std::borrow::Cow;

use axum::http::{HeaderMap, header};
use serde_json::Value;

/// A JSON body by what it says, any other by its bytes.
///
/// | two bodies | are |
/// | --- | --- |
/// | that differ in white space, in the order of names, in how a text is escaped | the same |
/// | `1`, `1.0`, `10e-1` | the same: a number is its decimal value, of any length |
/// | `1234567890123.4511`, `1234567890123.4512` | two, though no double tells them apart |
/// | `{"a":1,"a":2}`, `{"a":2}` | two: a repeated name counts each time, in its order |
/// | JSON, and the same bytes under another media type | two |
/// | that are no JSON though they are called so, are nested deeper than 128, or hold a number that is no double (`1e400`) | compared by their bytes |
pub(super) fn meaning(headers: &HeaderMap, body: &[u8]) -> Vec<u8> {
    let canonical = is_json(headers).then(|| canonical(body)).flatten();
    match canonical {
        Some(canonical) => [b"json\n", &*canonical].concat(),
        None => [b"bytes\n", body].concat(),
    }
}

/// `application/json`, and whatever is written in it (RFC 6839: `+json`).
fn is_json(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE);
    let Some(media_type) = media_type.and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

/// How version 1 of the fingerprint counted a body: numbers as doubles, and the
/// last one of a repeated name.
pub(super) fn version_1(headers: &HeaderMap, body: &[u8]) -> Vec<u8> {
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("application/json"));
    let canonical = is_json
        .then(|| serde_json::from_slice::<Value>(body).ok())
        .flatten()
        .filter(is_exact_in_version_1)
        .and_then(|value| serde_json_canonicalizer::to_vec(&value).ok());
    canonical.unwrap_or_else(|| body.to_vec())
}

/// Integers from 2^53 on were not told apart by it.
fn is_exact_in_version_1(value: &Value) -> bool {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|n| n.abs() < EXACT),
        Value::Array(items) => items.iter().all(is_exact_in_version_1),
        Value::Object(fields) => fields.values().all(is_exact_in_version_1),
        Value::Null | Value::Bool(_) | Value::String(_) => true,
    }
}

/// JSON in a form that all ways of writing the same have in common. Not RFC
/// 8785's, whose numbers are doubles and whose names are unique. `None` for what
/// is none, or is nested too deep.
fn canonical(body: &[u8]) -> Option<Vec<u8>> {
    let text = str::from_utf8(body).ok()?;
    // Checks the grammar, and bounds the depth.
    serde_json::from_str::<Value>(text).ok()?;
    let node = Reader { text, at: 0 }.value()?;
    let mut out = Vec::with_capacity(body.len());
    node.write(&mut out);
    Some(out)
}

enum Node<'a> {
    /// As it is written.
    Scalar(Cow<'a, str>),
    Array(Vec<Node<'a>>),
    /// In the order of the names, and of their coming where they are equal.
    Object(Vec<(String, Node<'a>)>),
}

impl Node<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Scalar(text) => out.extend(text.as_bytes()),
            Self::Array(items) => {
                out.push(b'[');
                for item in items {
                    item.write(out);
                    out.push(b',');
                }
                out.push(b']');
            }
            Self::Object(fields) => {
                out.push(b'{');
                for (name, value) in fields {
                    out.extend(string(name).as_bytes());
                    out.push(b':');
                    value.write(out);
                    out.push(b',');
                }
                out.push(b'}');
            }
        }
    }
}

fn string(text: &str) -> String {
    Value::from(text).to_string()
}

/// Goes through text that is known to be JSON.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn value(&mut self) -> Option<Node<'a>> {
        match self.next()? {
            b'{' => {
                self.at += 1;
                let mut fields = Vec::new();
                while self.next()? != b'}' {
                    let name = self.string()?;
                    self.skip(b':')?;
                    fields.push((name, self.value()?));
                    self.skip_comma()?;
                }
                self.at += 1;
                fields.sort_by(|(a, _), (b, _)| a.cmp(b));
                Some(Node::Object(fields))
            }
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                while self.next()? != b']' {
                    items.push(self.value()?);
                    self.skip_comma()?;
                }
                self.at += 1;
                Some(Node::Array(items))
            }
            b'"' => Some(Node::Scalar(string(&self.string()?).into())),
            b'-' | b'0'..=b'9' => Some(Node::Scalar(decimal(self.word())?.into())),
            _ => Some(Node::Scalar(self.word().into())),
        }
    }

    /// The next byte that is no white space.
    fn next(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let white = rest.iter().take_while(|byte| byte.is_ascii_whitespace());
        self.at += white.count();
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip(&mut self, byte: u8) -> Option<()> {
        (self.next()? == byte).then(|| self.at += 1)
    }

    fn skip_comma(&mut self) -> Option<()> {
        if self.next()? == b',' {
            self.at += 1;
        }
        Some(())
    }

    /// A number or a literal.
    fn word(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)));
        let word = &rest[..end.unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    fn string(&mut self) -> Option<String> {
        let rest = &self.text[self.at..];
        let mut escaped = false;
        let end = rest.bytes().skip(1).position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        })?;
        let quoted = &rest[..end + 2];
        self.at += quoted.len();
        serde_json::from_str(quoted).ok()
    }
}

/// A JSON number by its value: digits without zeros at either end, and a power
/// of ten. `None` if that is beyond all measure.
fn decimal(number: &str) -> Option<String> {
    let (sign, number) = match number.strip_prefix('-') {
        Some(number) => ("-", number),
        None => ("", number),
    };
    let (mantissa, power) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let digits = digits.trim_start_matches('0');
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some("0".to_owned());
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let power = power.parse::<i64>().ok()?;
    let power = power
        .checked_sub(i64::try_from(fraction.len()).ok()?)?
        .checked_add(zeros)?;
    Some(format!("{sign}{significant}e{power}"))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn typed(media_type: &str, body: &str) -> Vec<u8> {
        let value = HeaderValue::from_str(media_type).unwrap();
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value)]);
        meaning(&headers, body.as_bytes())
    }

    fn json(body: &str) -> Vec<u8> {
        typed("application/json", body)
    }

    #[test]
    fn two_ways_of_writing_the_same_are_the_same() {
        for (one, other) in [
            (
                r#"{"a":1,"b":[true,null]}"#,
                "\t{ \"b\" : [ true , null ] ,\r\n\"a\":1 } ",
            ),
            (
                r#"{"A":"\\\"ö/"}"#,
                "{\"\\u0041\":\"\\u005c\\u0022\\u00f6\\/\"}",
            ),
            ("[1, -1, 0.5, 120]", "[1.0, -10e-1, 5E-1, 1.20e+2]"),
            ("[0, 0, 0]", "[-0, 0.00, 0e999]"),
            (
                "123456789012345678901234567890",
                "1.2345678901234567890123456789e29",
            ),
            (r#"{"a":{"y":[],"x":{}}}"#, r#"{"a":{"x":{ },"y":[ ]}}"#),
            ("\"a\"", " \"\\u0061\""),
        ] {
            assert_eq!(json(one), json(other), "{one} {other}");
        }
        let as_json = json("{\"a\": 1}");
        for media_type in [
            "Application/JSON; charset=utf-8",
            "application/vnd.api+json",
            "application/json ;v=1",
        ] {
            assert_eq!(typed(media_type, "{\"a\":1.0}"), as_json, "{media_type}");
        }
    }

    #[test]
    fn what_json_tells_apart_is_told_apart() {
        let bodies = [
            "1234567890123.4511",
            "1234567890123.4512",
            "9007199254740992",
            "9007199254740993",
            "0.1",
            "0.10000000000000000001",
            "1e400",
            "1e401",
            "1e-400",
            "1e-401",
            "-1e-400",
            "0",
            "1",
            "-1",
            "10",
            r#"{"quantity":1,"quantity":2}"#,
            r#"{"quantity":2,"quantity":1}"#,
            r#"{"quantity":2}"#,
            r#"{"quantity":2,"quantity":2}"#,
            r#"{"quantity":"2"}"#,
            r#"{"quantity":null}"#,
            r#"{"a":[1,2]}"#,
            r#"{"a":[2,1]}"#,
            r#"{"a":[[1],2]}"#,
            r#"{"a":[1],"b":2}"#,
            r#"{"a":{"b":2},"c":1}"#,
            r#"{"a":{"b":2,"c":1}}"#,
            "[]",
            "{}",
            "[{}]",
            "[[]]",
            "\"\"",
            "\"1e0\"",
            "null",
            "true",
            "false",
            "",
            "{",
            "{ ",
            "\"\\ud800\"",
        ];
        let meanings: std::collections::BTreeSet<_> =
            bodies.iter().map(|body| json(body)).collect();
        assert_eq!(meanings.len(), bodies.len());
        assert_ne!(json("{\"a\":1}"), typed("text/plain", "{\"a\":1}"));
        assert_ne!(
            typed("application/json-seq", "{\"a\":1}"),
            typed("application/json-seq", "{\"a\": 1}")
        );
    }

    /// Neither the stack nor the time is the sender's to choose.
    #[test]
    fn a_body_that_is_nested_deep_counts_by_its_bytes() {
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(json(&deep(100)).starts_with(b"json\n"));
        assert!(json(&deep(500_000)).starts_with(b"bytes\n"));
    }

    proptest! {
        #[test]
        fn a_number_is_its_value(units in -10_000_000_i64..10_000_000, scale in 0_u32..6) {
            // 12.5 as 12.5, 125e-1 and 1250e-2.
            let plain = {
                let text = format!("{:0>width$}", units.abs(), width = scale as usize + 1);
                let (whole, fraction) = text.split_at(text.len() - scale as usize);
                let sign = if units < 0 { "-" } else { "" };
                if scale == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") }
            };
            prop_assert_eq!(decimal(&plain), decimal(&format!("{units}e-{scale}")));
            prop_assert_eq!(decimal(&plain), decimal(&format!("{}E-{}", units * 10, scale + 1)));
            prop_assert_ne!(decimal(&plain), decimal(&format!("{}e-{scale}", units + 1)));
        }

        #[test]
        fn any_json_is_itself_written_otherwise(
            names in proptest::collection::vec("\\PC{0,6}", 0..5),
            texts in proptest::collection::vec(any::<String>(), 0..5),
            numbers in proptest::collection::vec(any::<i64>(), 0..5),
        ) {
            let fields: serde_json::Map<_, _> = names
                .into_iter()
                .zip(texts.into_iter().zip(numbers))
                .map(|(name, (text, number))| (name, serde_json::json!([text, number, {"x": text}])))
                .collect();
            let value = Value::from(fields);
            let compact = json(&value.to_string());
            prop_assert!(compact.starts_with(b"json\n"));
            prop_assert_eq!(&compact, &json(&serde_json::to_string_pretty(&value).unwrap()));
            let more = serde_json::json!([value]);
            prop_assert_ne!(compact, json(&more.to_string()));
        }
    }
}
