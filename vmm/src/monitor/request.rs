//! The shape of a request: `execute` or `exec-oob`, `arguments`, `id`.

use serde_json::{Map, Value};

use super::error::QmpError;

/// A well-formed request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    /// Whatever the client gave; its reply carries it back.
    pub(super) id: Option<Value>,
    /// Asked for with `exec-oob`: to be done before what is queued.
    pub(super) out_of_band: bool,
}

/// A request that is refused before anybody looks for its command.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Malformed {
    pub(super) id: Option<Value>,
    pub(super) error: QmpError,
}

/// Checks the shape of a message. `exec-oob` is a known member only where
/// `oob` was negotiated.
pub(super) fn check(message: Value, oob: bool) -> Result<Request, Box<Malformed>> {
    let Value::Object(mut members) = message else {
        return Err(Box::new(Malformed {
            id: None,
            error: QmpError::generic("QMP input must be a JSON object"),
        }));
    };
    let id = members.remove("id");
    match check_members(members, oob) {
        Ok((command, arguments, out_of_band)) => Ok(Request {
            command,
            arguments,
            id,
            out_of_band,
        }),
        Err(error) => Err(Box::new(Malformed { id, error })),
    }
}

/// The command, its arguments, and whether it is out of band.
fn check_members(
    members: Map<String, Value>,
    oob: bool,
) -> Result<(String, Map<String, Value>, bool), QmpError> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("arguments", Value::Object(given)) => arguments = given,
            ("arguments", _) => return Err(member("arguments", "must be an object")),
            ("execute", _) if command.is_some() => {
                return Err(member("execute", "clashes with 'exec-oob'"));
            }
            ("execute", Value::String(given)) => command = Some((given, false)),
            ("exec-oob", Value::String(given)) if oob => command = Some((given, true)),
            ("execute", _) => return Err(member("execute", "must be a string")),
            ("exec-oob", _) if oob => return Err(member("exec-oob", "must be a string")),
            _ => return Err(member(&name, "is unexpected")),
        }
    }
    let (command, out_of_band) =
        command.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
    Ok((command, arguments, out_of_band))
}

fn member(name: &str, problem: &str) -> QmpError {
    QmpError::generic(format!("QMP input member '{name}' {problem}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(message: Value, oob: bool) -> String {
        check(message, oob).unwrap_err().error.desc
    }

    #[test]
    fn a_request_keeps_its_arguments_and_id() {
        let message = json!({"execute": "stop", "arguments": {"a": 1}, "id": [null]});
        let request = check(message, false).unwrap();
        assert_eq!(request.command, "stop");
        assert_eq!(request.arguments["a"], 1);
        assert_eq!(request.id, Some(json!([null])));
        assert!(!request.out_of_band);
    }

    #[test]
    fn every_wrong_shape_has_its_text() {
        let object = "QMP input must be a JSON object";
        let cases = [
            (json!([]), object),
            (json!(5), object),
            (json!({}), "QMP input lacks member 'execute'"),
            (
                json!({"execute": 5}),
                "QMP input member 'execute' must be a string",
            ),
            (
                json!({"execute": "x", "arguments": null}),
                "QMP input member 'arguments' must be an object",
            ),
            (
                json!({"execute": "x", "extra": 1}),
                "QMP input member 'extra' is unexpected",
            ),
            (
                json!({"exec-oob": "x"}),
                "QMP input member 'exec-oob' is unexpected",
            ),
        ];
        for (message, text) in cases {
            assert_eq!(error(message, false), text);
        }
    }

    #[test]
    fn exec_oob_is_known_once_negotiated() {
        assert!(check(json!({"exec-oob": "x"}), true).unwrap().out_of_band);
        assert_eq!(
            error(json!({"exec-oob": 7}), true),
            "QMP input member 'exec-oob' must be a string"
        );
        assert_eq!(
            error(json!({"exec-oob": "x", "execute": "y"}), true),
            "QMP input member 'execute' clashes with 'exec-oob'"
        );
    }

    #[test]
    fn a_refusal_keeps_the_id() {
        let malformed = check(json!({"id": 3}), false).unwrap_err();
        assert_eq!(malformed.id, Some(json!(3)));
    }
}
