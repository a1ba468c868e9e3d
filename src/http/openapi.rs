//! The API's description, OpenAPI 3.1: schemas from the types that are sent,
//! error codes from the catalogue. A test holds real answers against it.

use std::{collections::BTreeMap, sync::LazyLock};

use serde_json::{Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        Components, ComponentsBuilder, Content, ContentBuilder, Header, HttpMethod, Info,
        InfoBuilder, License, OpenApi, OpenApiBuilder, Paths, Ref, RefOr, Required, Response,
        ResponseBuilder, Schema,
        encoding::EncodingBuilder,
        path::{
            Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, ParameterStyle,
        },
        request_body::{RequestBody, RequestBodyBuilder},
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};

use super::{
    charges::{CUSTOMER_MAX, DESCRIPTION_MAX, SOURCE_MAX},
    idempotency_keys,
    list_query::{LIMIT_DEFAULT, LIMIT_MAX, POLLING_OVERLAP, SECOND_MAX},
    params::{METADATA_KEY_MAX, METADATA_VALUE_MAX},
};
use crate::{
    changes::CaptureRequest,
    charges::{self, ChargeRequest, ChargeUpdate, METADATA_ENTRIES_MAX},
    error::{CATALOGUE, Entry, Problem, Retry, StripeError},
    idempotency::KEY_MAX,
    ids::{AccountId, ApiKeyId, ChargeId, RefundId, RequestId},
    money::{AMOUNT_MAX, Amount, Currency},
    refunds::{self, Reason, RefundRequest},
};

/// The description as it is served and committed.
///
/// # Panics
/// Never: it is plain data.
pub static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut text = document().to_pretty_json().expect("it is plain data");
    text.push('\n');
    text
});

/// A schema from its JSON.
fn schema(schema: Value) -> RefOr<Schema> {
    RefOr::T(serde_json::from_value(schema).expect("the schemas here are schemas"))
}

macro_rules! text_schema {
    ($($type:ty: $schema:expr;)*) => {$(
        impl PartialSchema for $type {
            fn schema() -> RefOr<Schema> {
                schema($schema)
            }
        }
        impl ToSchema for $type {}
    )*};
}

fn id(prefix: &str) -> Value {
    json!({
        "type": "string",
        "pattern": format!("^{prefix}_[0-9a-f]{{32}}$"),
        "examples": [format!("{prefix}_01a20d6e5ab775f2a7b8c2c1d57f3b1e")],
    })
}

/// A text of 1 to `max` characters, or null where there is none.
fn text_or_null(max: usize) -> Value {
    json!({"type": ["string", "null"], "minLength": 1, "maxLength": max})
}

/// An idempotency key as it is sent: bare, or as a quoted string.
fn key_schema() -> Value {
    let pattern = format!(
        r#"^([!#-~][!-~]{{0,{}}}|"([!#-\[\]-~]|\\["\\]){{1,{KEY_MAX}}}")$"#,
        KEY_MAX - 1
    );
    // A quoted string may escape every character.
    json!({"type": "string", "minLength": 1, "maxLength": 2 * KEY_MAX + 2, "pattern": pattern})
}

/// Metadata as it is sent. JSON's null is the same as nothing, and so is an empty
/// text, as Stripe's clients write it.
fn metadata_sent() -> Value {
    json!({
        "type": ["object", "string", "null"],
        "maxLength": 0,
        "maxProperties": METADATA_ENTRIES_MAX,
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": METADATA_KEY_MAX, "pattern": r"^[^\[\]]+$"},
        "additionalProperties": {"type": ["string", "null"], "maxLength": METADATA_VALUE_MAX},
    })
}

/// Metadata as it stands in an answer.
fn metadata_kept() -> Value {
    json!({
        "maxProperties": METADATA_ENTRIES_MAX,
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": METADATA_KEY_MAX},
        "additionalProperties": {"type": "string", "minLength": 1, "maxLength": METADATA_VALUE_MAX},
    })
}

/// What the types do not say of their fields: limits, and where null may stand. Each
/// is set in the field's own schema.
fn limited(of: RefOr<Schema>, limits: &[(&str, Value)]) -> RefOr<Schema> {
    let mut of = serde_json::to_value(of).expect("a schema is plain data");
    for (field, limits) in limits {
        let field = of["properties"][field]
            .as_object_mut()
            .unwrap_or_else(|| panic!("there is no field {field}"));
        if limits.get("$ref").is_some() {
            field.remove("oneOf");
        }
        for (name, limit) in limits.as_object().expect("limits are an object") {
            field.insert(name.clone(), limit.clone());
        }
    }
    schema(of)
}

/// A field that always says the same, or one of these.
fn one_of(words: &[&str]) -> Value {
    json!({"enum": words})
}

text_schema! {
    AccountId: id("acct");
    ApiKeyId: id("ak");
    ChargeId: id("ch");
    RefundId: id("re");
    RequestId: id("req");
    Amount: json!({
        "type": "integer", "format": "int64", "minimum": 1, "maximum": AMOUNT_MAX,
        "description": "In the currency's minor unit: cents, yen.",
    });
    Currency: json!({
        "type": "string", "pattern": "^[a-z]{3}$", "examples": ["usd"],
        "description": "ISO 4217, in lower case.",
    });
}

/// An operation of the API, in short.
struct Described {
    method: HttpMethod,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    /// Of the body, for those that have one.
    request: Option<(&'static str, Value)>,
    /// Of the answer; a list of it, if the path is one of a list.
    answer: &'static str,
    query: Vec<Parameter>,
    /// What it can be told beside what all can be told.
    codes: &'static [&'static str],
}

/// What every operation can be told.
const OF_ALL: &[&str] = &[
    "api_key_invalid",
    "parameter_unknown",
    "parameter_repeated",
    "parameter_unreadable",
    "rate_limited",
    "internal",
    "unavailable",
];

/// What every operation can be told that changes something.
const OF_CHANGES: &[&str] = &[
    "body_too_large",
    "media_type_unsupported",
    "idempotency_key_missing",
    "idempotency_key_invalid",
    "idempotency_key_reused",
    "idempotency_key_in_use",
    "duplicate_request",
];

#[expect(clippy::too_many_lines, reason = "it is a table")]
fn described() -> Vec<Described> {
    let charge_lists = vec![query(
        "customer",
        json!({"type": "string", "minLength": 1, "maxLength": CUSTOMER_MAX}),
        "Of this customer.",
    )];
    let refund_lists = vec![query("charge", id("ch"), "Of this charge.")];
    vec![
        Described {
            method: HttpMethod::Post,
            path: "/v1/charges",
            id: "createCharge",
            summary: "Charge once, or authorise",
            request: Some((
                "ChargeRequest",
                json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123", "source": "tok_visa", "metadata": {"order": "12345"}}),
            )),
            answer: "Charge",
            query: vec![header(
                "Payonce-Allow-Duplicate",
                json!({"type": "string", "enum": ["true", "false"]}),
                "Says that the request means it, where the duplicate guard would refuse it.",
            )],
            codes: &[
                "parameter_missing",
                "parameter_invalid",
                "parameter_invalid_empty",
                "parameter_invalid_integer",
                "card_declined",
                "expired_card",
                "incorrect_cvc",
                "processing_error",
                "duplicate_charge",
            ],
        },
        Described {
            method: HttpMethod::Get,
            path: "/v1/charges",
            id: "listCharges",
            summary: "List charges, newest first",
            request: None,
            answer: "Charge",
            query: list_parameters("ch", charge_lists),
            codes: &[
                "parameter_invalid",
                "parameter_invalid_empty",
                "parameter_invalid_integer",
                "resource_missing",
            ],
        },
        Described {
            method: HttpMethod::Get,
            path: "/v1/charges/{id}",
            id: "retrieveCharge",
            summary: "Read a charge",
            request: None,
            answer: "Charge",
            query: vec![],
            codes: &["resource_missing"],
        },
        Described {
            method: HttpMethod::Post,
            path: "/v1/charges/{id}",
            id: "updateCharge",
            summary: "Change a charge's description and metadata",
            request: Some((
                "ChargeUpdate",
                json!({"description": "Order 12345", "metadata": {"order": "12345"}}),
            )),
            answer: "Charge",
            query: vec![],
            codes: &["parameter_invalid", "resource_missing", "metadata_full"],
        },
        Described {
            method: HttpMethod::Post,
            path: "/v1/charges/{id}/capture",
            id: "captureCharge",
            summary: "Take what was authorised, or a part of it",
            request: Some(("CaptureRequest", json!({"amount": 3000}))),
            answer: "Charge",
            query: vec![],
            codes: &[
                "parameter_invalid_empty",
                "parameter_invalid_integer",
                "resource_missing",
                "charge_already_captured",
                "charge_already_refunded",
                "charge_not_capturable",
                "amount_too_large",
            ],
        },
        Described {
            method: HttpMethod::Post,
            path: "/v1/refunds",
            id: "createRefund",
            summary: "Give a charge back, or a part of it",
            request: Some((
                "RefundRequest",
                json!({"charge": "ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e", "amount": 1200, "reason": "requested_by_customer"}),
            )),
            answer: "Refund",
            query: vec![],
            codes: &[
                "parameter_missing",
                "parameter_invalid",
                "parameter_invalid_empty",
                "parameter_invalid_integer",
                "resource_missing",
                "charge_already_refunded",
                "charge_not_captured",
                "charge_not_refundable",
                "amount_too_large",
            ],
        },
        Described {
            method: HttpMethod::Get,
            path: "/v1/refunds",
            id: "listRefunds",
            summary: "List refunds, newest first",
            request: None,
            answer: "Refund",
            query: list_parameters("re", refund_lists),
            codes: &[
                "parameter_invalid",
                "parameter_invalid_empty",
                "parameter_invalid_integer",
                "resource_missing",
            ],
        },
        Described {
            method: HttpMethod::Get,
            path: "/v1/refunds/{id}",
            id: "retrieveRefund",
            summary: "Read a refund",
            request: None,
            answer: "Refund",
            query: vec![],
            codes: &["resource_missing"],
        },
        Described {
            method: HttpMethod::Get,
            path: "/v1/idempotency_keys/{key}",
            id: "retrieveIdempotencyKey",
            summary: "Find out what became of a key. 404 proves nothing before 10 s have passed since it was last sent",
            request: None,
            answer: "IdempotencyKey",
            query: vec![],
            codes: &["resource_missing"],
        },
    ]
}

fn parameter(name: &str, place: ParameterIn, schema_of: Value, about: &str) -> ParameterBuilder {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .description(Some(about))
        .schema(Some(schema(schema_of)))
}

fn query(name: &str, schema_of: Value, about: &str) -> Parameter {
    parameter(name, ParameterIn::Query, schema_of, about)
        .required(Required::False)
        .build()
}

fn header(name: &str, schema_of: Value, about: &str) -> Parameter {
    parameter(name, ParameterIn::Header, schema_of, about)
        .required(Required::False)
        .build()
}

fn list_parameters(prefix: &str, own: Vec<Parameter>) -> Vec<Parameter> {
    let second = |about: &str| json!({"type": "integer", "format": "int64", "minimum": 0, "maximum": SECOND_MAX, "description": about});
    let limit =
        json!({"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT});
    let created = json!({"anyOf": [
        {
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "gte": second("In this second or later."),
                "gt": second("Later."),
                "lte": second("In this second or earlier."),
                "lt": second("Earlier."),
            },
        },
        second("In this second."),
    ]});
    let mut parameters = own;
    parameters.extend([
        query("limit", limit, "How many."),
        query(
            "starting_after",
            id(prefix),
            "The id of the last one of the page before.",
        ),
        query(
            "ending_before",
            id(prefix),
            "The id of the first one of the page after. Not to be combined with starting_after.",
        ),
        parameter(
            "created",
            ParameterIn::Query,
            created,
            "When it was made, in seconds since 1970: a second, or bounds such as created[gte]=1790000000.",
        )
        .required(Required::False)
        .style(Some(ParameterStyle::DeepObject))
        .explode(Some(true))
        .build(),
    ]);
    parameters
}

/// Of a list.
fn list_description() -> String {
    format!(
        "Newest first, by id. What is made meanwhile does not shift the pages.\n\n\
        **To poll for what is new**, do not rely on `ending_before` alone: ids and `created` are \
        given out when a request arrives, and what it makes can be read once its transaction has \
        been committed, mostly milliseconds and at worst some 20 seconds later. By then newer \
        ones may have been listed, and `ending_before` misses it. Ask for `created[gte]` of the \
        `created` of the newest one seen minus {overlap} seconds, page to the end, and drop by \
        id what you have. The {overlap} seconds include clocks of replicas that differ by up to \
        half a minute; where a synchronous standby is away, a COMMIT takes as long as it is. A \
        feed of events is to replace polling.",
        overlap = POLLING_OVERLAP.as_secs(),
    )
}

impl Described {
    fn operation(&self) -> Operation {
        let changes = self.request.is_some();
        let mut operation = OperationBuilder::new()
            .operation_id(Some(self.id))
            .summary(Some(self.summary));
        if self.is_list() {
            operation = operation.description(Some(list_description()));
        }
        if changes {
            let key = parameter(
                "Idempotency-Key",
                ParameterIn::Header,
                key_schema(),
                "Names the operation: the same for every try of it, and another for every other one. 1 to 255 visible ASCII characters, bare or as a quoted string. (A service that was started with KEYLESS=fingerprint takes requests without it, too.)",
            );
            operation = operation.parameter(
                key.required(Required::True)
                    .example(Some(json!(format!("try_{}_1", self.id))))
                    .build(),
            );
        }
        for (name, of) in [("id", self.id_in_path()), ("key", key_schema())] {
            if self.path.contains(&format!("{{{name}}}")) {
                let place = parameter(name, ParameterIn::Path, of, "Which.");
                operation = operation.parameter(place.required(Required::True).build());
            }
        }
        for parameter in &self.query {
            operation = operation.parameter(parameter.clone());
        }
        if changes {
            operation = operation
                .parameter(header(
                    "Prefer",
                    json!({"type": "string", "examples": ["wait=5"]}),
                    "wait=N: how many seconds to wait if the key is in use, up to 10.",
                ))
                .request_body(self.request_body());
        }
        operation = operation.response("200", self.answered(changes));
        for (status, entries) in self.errors(changes) {
            operation = operation.response(status.to_string(), refused(status, &entries));
        }
        operation.build()
    }

    fn is_list(&self) -> bool {
        self.request.is_none() && !self.path.contains('{')
    }

    fn id_in_path(&self) -> Value {
        id(if self.path.starts_with("/v1/refunds") {
            "re"
        } else {
            "ch"
        })
    }

    fn request_body(&self) -> Option<RequestBody> {
        let (name, example) = self.request.as_ref()?;
        let content = || {
            ContentBuilder::new()
                .schema(Some(Ref::from_schema_name(*name)))
                .example(Some(example.clone()))
        };
        let mut form = content();
        if *name != "CaptureRequest" {
            let brackets = EncodingBuilder::new()
                .style(Some(ParameterStyle::DeepObject))
                .explode(Some(true));
            form = form.encoding("metadata", brackets.build());
        }
        let body = RequestBodyBuilder::new()
            .description(Some("At most 65,536 bytes. As a form, what is inside of something is named in brackets: metadata[order]=12345."))
            .content("application/json", content().build())
            .content("application/x-www-form-urlencoded", form.build());
        Some(body.build())
    }

    fn answered(&self, changes: bool) -> Response {
        let name = if self.is_list() {
            format!("{}List", self.answer)
        } else {
            self.answer.to_owned()
        };
        let content = Content::new(Some(Ref::from_schema_name(name)));
        let mut answer = ResponseBuilder::new()
            .description("Done")
            .content("application/json", content)
            .header("Request-Id", text_header("Of this context."));
        if changes {
            answer = answer.header(
                "Idempotent-Replayed",
                text_header("true: this is the first answer again."),
            );
        }
        if self.id == "createCharge" {
            answer = answer.header(
                "Payonce-Duplicate-Of",
                text_header("The charge that this one looks like, which was made just before under another key. Stands in replays too, as long as the answer is kept."),
            );
        }
        answer.build()
    }

    /// By their status.
    fn errors(&self, changes: bool) -> BTreeMap<u16, Vec<&'static Entry>> {
        let of_changes = if changes { OF_CHANGES } else { &[] };
        let mut errors: BTreeMap<u16, Vec<&Entry>> = BTreeMap::new();
        for entry in CATALOGUE {
            let code = &entry.code;
            if OF_ALL.contains(code) || of_changes.contains(code) || self.codes.contains(code) {
                errors.entry(entry.status).or_default().push(entry);
                // Stripe's SDKs get it as 400.
                if entry.code == "idempotency_key_reused" {
                    errors.entry(400).or_default().push(entry);
                }
            }
        }
        errors
    }
}

fn text_header(about: &str) -> Header {
    let mut header = Header::new(schema(json!({"type": "string"})));
    header.description = Some(about.to_owned());
    header
}

fn refused(status: u16, entries: &[&Entry]) -> Response {
    let codes: Vec<_> = entries
        .iter()
        .map(|entry| format!("`{}`: {}", entry.code, entry.title))
        .collect();
    let examples = entries.iter().map(|entry| {
        let example = utoipa::openapi::example::ExampleBuilder::new()
            .summary(entry.title)
            .value(Some(entry.example()))
            .build();
        (entry.code, RefOr::T(example))
    });
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .examples_from_iter(examples)
        .build();
    let mut response = ResponseBuilder::new()
        .description(codes.join("\n\n"))
        .content("application/problem+json", content)
        .header("Request-Id", text_header("Of this context."))
        .header("Stripe-Should-Retry", text_header("true or false."));
    if matches!(status, 409 | 429 | 503) {
        response = response.header("Retry-After", text_header("A pause in seconds."));
    }
    response.build()
}

fn list_schema(of: &str) -> RefOr<Schema> {
    schema(json!({
        "type": "object",
        "description": "A page of a list.",
        "required": ["object", "url", "has_more", "data"],
        "additionalProperties": false,
        "properties": {
            "object": {"type": "string", "enum": ["list"]},
            "url": {"type": "string"},
            "has_more": {"type": "boolean", "description": "Whether more follow in this direction."},
            "data": {"type": "array", "items": {"$ref": format!("#/components/schemas/{of}")}},
        },
    }))
}

fn charge_schema() -> RefOr<Schema> {
    let money = || json!({"minimum": 0, "maximum": AMOUNT_MAX});
    limited(
        charges::Wire::schema(),
        &[
            ("object", one_of(&["charge"])),
            ("status", one_of(&["pending", "succeeded", "failed"])),
            ("amount_captured", money()),
            ("amount_refunded", money()),
            ("customer", text_or_null(CUSTOMER_MAX)),
            ("source", text_or_null(SOURCE_MAX)),
            ("description", text_or_null(DESCRIPTION_MAX)),
            ("metadata", metadata_kept()),
        ],
    )
}

fn idempotency_key_schema() -> RefOr<Schema> {
    limited(
        idempotency_keys::Wire::schema(),
        &[
            ("object", one_of(&["idempotency_key"])),
            ("state", one_of(&["in_progress", "answered"])),
            ("key", json!({"minLength": 1, "maxLength": KEY_MAX})),
            ("response_status", json!({"minimum": 200, "maximum": 599})),
        ],
    )
}

/// What is not known is left out of it, and never null.
fn problem_schema() -> RefOr<Schema> {
    let request = Ref::from_schema_name("RequestId").ref_location;
    limited(
        Problem::schema(),
        &[
            ("status", json!({"minimum": 400, "maximum": 599})),
            ("differs", json!({"type": "array"})),
            ("original_request_id", json!({"$ref": request})),
        ],
    )
}

fn components() -> Components {
    ComponentsBuilder::new()
        .schema("Amount", Amount::schema())
        .schema("Currency", Currency::schema())
        .schema("ChargeId", ChargeId::schema())
        .schema("RefundId", RefundId::schema())
        .schema("RequestId", RequestId::schema())
        .schema("Reason", Reason::schema())
        .schema("Charge", charge_schema())
        .schema("WireOutcome", charges::WireOutcome::schema())
        .schema("ChargeList", list_schema("Charge"))
        .schema(
            "Refund",
            limited(
                refunds::Wire::schema(),
                &[
                    ("object", one_of(&["refund"])),
                    ("status", one_of(&["succeeded"])),
                    ("metadata", metadata_kept()),
                ],
            ),
        )
        .schema("RefundList", list_schema("Refund"))
        .schema("IdempotencyKey", idempotency_key_schema())
        .schema(
            "ChargeRequest",
            limited(
                ChargeRequest::schema(),
                &[
                    ("customer", text_or_null(CUSTOMER_MAX)),
                    ("source", text_or_null(SOURCE_MAX)),
                    ("description", text_or_null(DESCRIPTION_MAX)),
                    ("metadata", metadata_sent()),
                    ("capture", json!({"type": ["boolean", "null"]})),
                ],
            ),
        )
        .schema(
            "ChargeUpdate",
            limited(
                ChargeUpdate::schema(),
                &[
                    ("description", json!({"maxLength": DESCRIPTION_MAX})),
                    ("metadata", metadata_sent()),
                ],
            ),
        )
        .schema("CaptureRequest", CaptureRequest::schema())
        .schema(
            "RefundRequest",
            limited(RefundRequest::schema(), &[("metadata", metadata_sent())]),
        )
        .schema("Problem", problem_schema())
        .schema("Retry", Retry::schema())
        .schema("StripeError", StripeError::schema())
        .security_scheme(
            "bearer",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        )
        .security_scheme(
            "basic",
            SecurityScheme::Http(
                HttpBuilder::new()
                    .scheme(HttpAuthScheme::Basic)
                    .description(Some("The API key as user name, without a password."))
                    .build(),
            ),
        )
        .build()
}

fn info() -> Info {
    let mut license = License::new(env!("CARGO_PKG_LICENSE"));
    license.identifier = Some(env!("CARGO_PKG_LICENSE").to_owned());
    InfoBuilder::new()
        .title("payonce")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Payments that happen once, however often they are asked for. Every POST carries an Idempotency-Key; whoever asks again with it gets the first answer.\n\nTo try it on the page at /docs: press Authorize and give the API key (`make run` keeps the demo account's in .dev/demo.env), then Try it out at an operation.",
        ))
        .license(Some(license))
        .build()
}

/// The description, for the page that shows it.
pub(super) fn document() -> OpenApi {
    let mut paths = Paths::new();
    for described in described() {
        paths.add_path_operation(
            described.path,
            vec![described.method.clone()],
            described.operation(),
        );
    }
    OpenApiBuilder::new()
        .info(info())
        .paths(paths)
        .components(Some(components()))
        .security(Some(["bearer", "basic"].map(|scheme| {
            SecurityRequirement::new::<&str, [&str; 0], &str>(scheme, [])
        })))
        .build()
}
