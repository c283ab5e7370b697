//! Why a request had no whole answer, as everybody tells it apart who asks a server.

use std::{io::ErrorKind, time::Duration};

use ureq::{Error, Timeout};

/// What became of a request, with words for it.
#[derive(Debug, PartialEq, Eq)]
pub enum Lost {
    NoConnection(String),
    /// A time limit other than that of the connection.
    TooLate,
    BrokenOff(String),
    /// The certificate is another's, or it is no TLS at all.
    NoTls(String),
    /// An answer that is not as HTTP has it, or ends in its middle.
    NoHttp(String),
    /// No request can be sent there.
    Address(String),
    Other(String),
}

/// `patience` is how long a connection was waited for.
pub fn lost(error: &Error, patience: Duration) -> Lost {
    match error {
        Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
            Lost::NoConnection(format!("no connection within {} s", patience.as_secs_f64()))
        }
        Error::Timeout(_) => Lost::TooLate,
        Error::HostNotFound | Error::ConnectionFailed => Lost::NoConnection(error.to_string()),
        Error::Io(cause) => match cause.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                Lost::NoConnection(format!("no connection: {cause}"))
            }
            ErrorKind::InvalidData => Lost::NoTls(cause.to_string()),
            // A name that cannot be looked up has no kind of its own.
            _ if cause.to_string().contains("lookup") => Lost::NoConnection(format!("no connection: {cause}")),
            _ => Lost::BrokenOff(cause.to_string()),
        },
        Error::Protocol(_) | Error::BodyStalled | Error::Decompress(..) => Lost::NoHttp(error.to_string()),
        Error::BadUri(_) | Error::Http(_) => Lost::Address(error.to_string()),
        _ => Lost::Other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::{io, net::ToSocketAddrs};

    use super::*;

    #[test]
    fn a_name_that_cannot_be_looked_up_is_no_connection() {
        let told = |error| lost(&error, Duration::from_secs(20));
        // Longer than a name may be: nobody is asked for it.
        let unknown = ("x".repeat(70), 80).to_socket_addrs().unwrap_err();
        let Lost::NoConnection(what) = told(Error::Io(unknown)) else { panic!() };
        assert!(what.starts_with("no connection: failed to lookup"), "{what}");
        let no_connection = Lost::NoConnection("no connection within 20 s".into());
        assert_eq!(told(Error::Timeout(Timeout::Resolve)), no_connection);
        assert_eq!(told(Error::Timeout(Timeout::RecvBody)), Lost::TooLate);
        let io = |kind: ErrorKind| told(Error::Io(io::Error::new(kind, "what")));
        assert_eq!(io(ErrorKind::ConnectionRefused), Lost::NoConnection("no connection: what".into()));
        assert_eq!(io(ErrorKind::ConnectionReset), Lost::BrokenOff("what".into()));
        assert_eq!(io(ErrorKind::InvalidData), Lost::NoTls("what".into()));
    }
}
