//! A web server for tests: one content at every path, ranges, and misbehaviour on request.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

/// How one request is answered; when the list is used up, all go well.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    Status(u16),
    /// The connection is closed after this many bytes of the body.
    BreakAfter(usize),
    /// The whole content, whatever range was asked for.
    WholeAgain,
    Well,
}

/// What was asked for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub range_start: Option<u64>,
    pub if_range: Option<String>,
}

pub struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves until the test's process ends.
    pub fn start(content: &[u8], answers: Vec<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { address: listener.local_addr().unwrap(), requests: Arc::default() };
        let (content, requests) = (content.to_vec(), Arc::clone(&server.requests));
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            for stream in listener.incoming().flatten() {
                // A client that hangs up is part of the game.
                let _ = serve(stream, &content, &requests, answers.next().unwrap_or(Answer::Well));
            }
        });
        server
    }

    pub fn address(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, content: &[u8], requests: &Mutex<Vec<Request>>, answer: Answer) -> std::io::Result<()> {
    let mut request = Request::default();
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?;
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                request.range_start =
                    value.trim().strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')?.parse().ok());
            }
            "if-range" => request.if_range = Some(value.trim().to_owned()),
            "" => break,
            _ => {}
        }
    }
    requests.lock().unwrap().push(request.clone());
    let size = content.len();
    let end = "ETag: \"one\"\r\nConnection: close\r\n\r\n";
    let from = match (answer, request.range_start) {
        (Answer::Status(status), _) => {
            return write!(stream, "HTTP/1.1 {status} So\r\nContent-Length: 0\r\n{end}");
        }
        (Answer::WholeAgain, _) | (_, None) => None,
        (_, Some(from)) => Some(usize::try_from(from).unwrap()),
    };
    let body = match from {
        Some(from) if from >= size => {
            return write!(
                stream,
                "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{size}\r\nContent-Length: 0\r\n{end}"
            );
        }
        Some(from) => {
            let body = &content[from..];
            let range = format!("Content-Range: bytes {from}-{}/{size}", size - 1);
            write!(stream, "HTTP/1.1 206 Partial Content\r\n{range}\r\nContent-Length: {}\r\n{end}", body.len())?;
            body
        }
        None => {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n{end}")?;
            content
        }
    };
    let sent = if let Answer::BreakAfter(bytes) = answer { bytes.min(body.len()) } else { body.len() };
    stream.write_all(&body[..sent])?;
    stream.flush()
}
